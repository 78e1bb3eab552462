//! Which parts of a model each rank of a pipeline holds.
//!
//! The first stage has the embedding, the last one the norm, the output head and the MTP modules. MTP modules embed tokens
//! too, and a tied head is the embedding itself. DualPipe and DualPipeV have both ends of the pipeline on the same ranks
//! and so one embedding for both (report, section 3.2.1); with 1F1B and ZB1P the last rank has a copy of it.

use std::ops::Range;

use deepburn_model::config::ModelConfig;

use super::schedule::{Direction, Placement, Refused};

/// A model on the ranks of a pipeline.
#[derive(Clone, Debug, PartialEq)]
pub struct Layout {
    placement: Placement,
    /// The layers of each stage.
    stages: Vec<Range<usize>>,
    embeds_at_the_end: bool,
}

/// One stage of the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stage {
    /// Its layers.
    pub layers: Range<usize>,
    /// Whether it begins with the embedding.
    pub is_first: bool,
    /// Whether it ends with the losses.
    pub is_last: bool,
}

/// What is on a rank as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece {
    /// The embedding matrix.
    Embedding,
    /// The layer of this number.
    Layer(usize),
    /// The norm after the last layer, the output head and the MTP modules.
    End,
}

impl Piece {
    /// The one that the parameter of this name is in.
    pub fn of(path: &str) -> Self {
        let mut names = path.split('.');
        match (names.next(), names.next().map(str::parse)) {
            (Some("embed_tokens"), _) => Self::Embedding,
            (Some("layers"), Some(Ok(layer))) => Self::Layer(layer),
            _ => Self::End,
        }
    }
}

impl Layout {
    /// The layers of a model divided among the stages: as `counts` says, or as evenly as they can be, the later stages
    /// having one more.
    ///
    /// # Errors
    /// Counts that do not fit, or a stage between the first and the last that has no layer.
    pub fn new(
        placement: Placement,
        shape: &ModelConfig,
        counts: Option<&[usize]>,
    ) -> Result<Self, Refused> {
        let (stages, layers) = (placement.stages(), shape.num_hidden_layers);
        let counts = counts.map_or_else(|| even(layers, stages), <[usize]>::to_vec);
        let refused = |rule| {
            Err(Refused {
                field: "layers",
                value: format!("{counts:?}"),
                rule,
            })
        };
        if counts.len() != stages {
            return refused(format!("there are {stages} stages"));
        }
        if counts.iter().sum::<usize>() != layers {
            return refused(format!("the model has {layers} layers"));
        }
        let between = 1..stages.saturating_sub(1);
        if let Some(stage) = between.into_iter().find(|&stage| counts[stage] == 0) {
            return refused(format!("stage {stage} needs a layer"));
        }
        let mut end = 0;
        let stages = counts.into_iter().map(|count| {
            end += count;
            end - count..end
        });
        Ok(Self {
            placement,
            stages: stages.collect(),
            embeds_at_the_end: shape.num_nextn_predict_layers > 0 || shape.tie_word_embeddings,
        })
    }

    /// Where the stages are.
    pub fn placement(&self) -> Placement {
        self.placement
    }

    /// The stage that a rank has for a direction.
    pub fn stage(&self, rank: usize, direction: Direction) -> Stage {
        let number = self.placement.stage(rank, direction);
        Stage {
            layers: self.stages[number].clone(),
            is_first: number == 0,
            is_last: number + 1 == self.stages.len(),
        }
    }

    /// Whether a rank has a piece of the model.
    pub fn holds(&self, rank: usize, piece: Piece) -> bool {
        let directions = self.placement.directions().iter();
        let mut stages = directions.map(|&direction| self.stage(rank, direction));
        stages.any(|stage| match piece {
            Piece::Embedding => stage.is_first || stage.is_last && self.embeds_at_the_end,
            Piece::Layer(layer) => stage.layers.contains(&layer),
            Piece::End => stage.is_last,
        })
    }

    /// The ranks that have it, in order: one, or as many as there are copies.
    pub fn holders(&self, piece: Piece) -> Vec<usize> {
        let ranks = 0..self.placement.ranks;
        ranks.filter(|&rank| self.holds(rank, piece)).collect()
    }
}

fn even(layers: usize, stages: usize) -> Vec<usize> {
    let ends = (0..=stages).map(|stage| layers * stage / stages);
    let ends: Vec<usize> = ends.collect();
    ends.windows(2).map(|ends| ends[1] - ends[0]).collect()
}

#[cfg(test)]
mod tests {
    use deepburn_model::checkpoint::hf_config;

    use super::*;
    use crate::pipeline::schedule::Schedule;

    fn shape(layers: usize) -> ModelConfig {
        let tiny = include_str!("../../../configs/model/tiny.json");
        ModelConfig {
            num_hidden_layers: layers,
            ..hf_config::parse(tiny).unwrap()
        }
    }

    #[test]
    fn both_ends_are_on_the_same_ranks_where_the_route_brings_them_there() {
        let holders = |schedule: Schedule, piece| {
            let placement = schedule.placement(4);
            let layout = Layout::new(placement, &shape(8), None).unwrap();
            layout.holders(piece)
        };
        let ends = |schedule| [Piece::Embedding, Piece::End].map(|piece| holders(schedule, piece));
        assert_eq!(ends(Schedule::ZeroBubble), [vec![0, 3], vec![3]]);
        assert_eq!(ends(Schedule::DualPipe), [vec![0, 3], vec![0, 3]]);
        assert_eq!(ends(Schedule::DualPipeV), [vec![0], vec![0]]);
        assert_eq!(holders(Schedule::OneFOneB, Piece::Layer(5)), [2]);
        assert_eq!(holders(Schedule::DualPipe, Piece::Layer(5)), [1, 2]);
        assert_eq!(holders(Schedule::DualPipeV, Piece::Layer(5)), [2]);
    }

    #[test]
    fn layers_are_divided_evenly_or_as_asked_for() {
        let placement = Schedule::OneFOneB.placement(4);
        let counts = |layers, counts: Option<&[usize]>| {
            let layout = Layout::new(placement, &shape(layers), counts);
            layout.map(|layout| layout.stages.iter().map(Range::len).collect::<Vec<_>>())
        };
        assert_eq!(counts(10, None).unwrap(), [2, 3, 2, 3]);
        assert_eq!(counts(2, Some(&[0, 1, 1, 0])).unwrap(), [0, 1, 1, 0]);
        let refused = |layers, asked| counts(layers, asked).unwrap_err().to_string();
        assert_eq!(
            refused(2, Some(&[2, 0, 0, 0])),
            "layers = [2, 0, 0, 0]: stage 1 needs a layer"
        );
        assert_eq!(
            refused(4, Some(&[1, 1, 2])),
            "layers = [1, 1, 2]: there are 4 stages"
        );
        assert_eq!(
            refused(4, Some(&[1, 1, 1, 2])),
            "layers = [1, 1, 1, 2]: the model has 4 layers"
        );
    }

    #[test]
    fn names_lead_to_pieces() {
        assert_eq!(Piece::of("embed_tokens.weight"), Piece::Embedding);
        assert_eq!(Piece::of("layers.12.mlp.gate.weight"), Piece::Layer(12));
        for path in ["norm.weight", "lm_head.weight", "mtp.0.block.mlp.up_proj"] {
            assert_eq!(Piece::of(path), Piece::End);
        }
    }
}
