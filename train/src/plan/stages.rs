//! Which parts of the model are in which pipeline stage.

use std::cmp::Ordering;

use deepburn_model::config::ModelConfig;

use super::{config::PlanConfig, gemm::Part};
use crate::{config::ConfigError, pipeline::schedule::Placement};

/// The parts of each stage, in order.
///
/// # Errors
/// A list of layers that does not fit, or fewer layers than stages.
pub fn stages(
    model: &ModelConfig,
    config: &PlanConfig,
    cost: impl Fn(Part) -> f64,
) -> Result<Vec<Vec<Part>>, ConfigError> {
    let [before, layers, after] = Part::all(model);
    let placement = config.layout.schedule.placement(config.layout.pp);
    let count = placement.stages();
    if count > layers.len() {
        let rule = format!(
            "gives {count} stages, which must not be more than num_hidden_layers = {} of the model",
            layers.len()
        );
        return Err(ConfigError::rule("layout.pp", config.layout.pp, &rule));
    }
    let sum = |parts: &[Part]| -> f64 { parts.iter().map(|&part| cost(part)).sum() };
    let listed = &config.layout.layers_per_stage;
    let counts = if listed.is_empty() {
        let layers: Vec<f64> = layers.iter().map(|&part| cost(part)).collect();
        balanced(&layers, placement, [sum(&before), sum(&after)])
    } else {
        let total: usize = listed.iter().sum();
        if listed.len() != count || total != layers.len() {
            let rule = format!(
                "must be {count} numbers, one for each stage, that add up to num_hidden_layers = {} of the model",
                layers.len()
            );
            let list = format!("{listed:?}");
            return Err(ConfigError::rule("layout.layers_per_stage", list, &rule));
        }
        listed.clone()
    };
    let mut rest = layers.as_slice();
    let mut stages: Vec<Vec<Part>> = counts
        .into_iter()
        .map(|count| {
            let (stage, others) = rest.split_at(count);
            rest = others;
            stage.to_vec()
        })
        .collect();
    stages[0].splice(..0, before);
    stages[count - 1].extend(after);
    Ok(stages)
}

/// Layers of each stage: moves one layer at a time from stage to stage while that makes the longest rank shorter or,
/// if it stays as long, the stages more alike.
fn balanced(layers: &[f64], placement: Placement, [before, after]: [f64; 2]) -> Vec<usize> {
    let stages = placement.stages();
    let measure = |counts: &[usize]| {
        let mut rest = layers;
        let mut costs: Vec<f64> = Vec::with_capacity(stages);
        for &count in counts {
            let (stage, others) = rest.split_at(count);
            costs.push(stage.iter().sum());
            rest = others;
        }
        costs[0] += before;
        costs[stages - 1] += after;
        let ranks = (0..placement.ranks).map(|rank| -> f64 {
            let directions = placement.directions().iter();
            directions
                .map(|&way| costs[placement.stage(rank, way)])
                .sum()
        });
        let longest = ranks.fold(0.0, f64::max);
        let spread: f64 = costs.iter().map(|cost| cost * cost).sum();
        (longest, spread)
    };
    let mut counts: Vec<usize> = (0..stages)
        .map(|stage| layers.len() * (stage + 1) / stages - layers.len() * stage / stages)
        .collect();
    let mut best = measure(&counts);
    loop {
        let mut improved = None;
        for from in 0..stages {
            // The head alone is a stage; nothing alone is not.
            if counts[from] <= usize::from(from + 1 < stages) {
                continue;
            }
            for to in (0..stages).filter(|&to| to != from) {
                let mut moved = counts.clone();
                moved[from] -= 1;
                moved[to] += 1;
                let measured = measure(&moved);
                if less(measured, best) {
                    best = measured;
                    improved = Some(moved);
                }
            }
        }
        match improved {
            Some(moved) => counts = moved,
            None => return counts,
        }
    }
}

/// Sums of the same numbers in another order may differ in the last digits.
fn less((longest, spread): (f64, f64), (than_longest, than_spread): (f64, f64)) -> bool {
    let compare = |a: f64, b: f64| match (a - b).abs() <= 1e-9 * b.abs() {
        true => Ordering::Equal,
        false => a.total_cmp(&b),
    };
    compare(longest, than_longest)
        .then(compare(spread, than_spread))
        .is_lt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        pipeline::schedule::Schedule,
        plan::test_model::{small, small_plan},
    };

    #[test]
    fn a_heavy_end_gets_fewer_layers() {
        let layers = [1.0; 10];
        let counts =
            |schedule: Schedule, ranks, ends| balanced(&layers, schedule.placement(ranks), ends);
        assert_eq!(counts(Schedule::OneFOneB, 5, [0.0; 2]), [2; 5]);
        // 13 in all on four ranks: no better than 4, with 3 of them in the head.
        let heavy = counts(Schedule::OneFOneB, 4, [0.0, 3.0]);
        assert!(
            heavy[3] <= 1 && heavy.iter().all(|&count| count <= 4),
            "{heavy:?}"
        );
        // Ranks 0 and 3 share the first and the last stage: 12 in all, 6 each.
        let shared = counts(Schedule::DualPipe, 4, [0.0, 2.0]);
        assert_eq!(shared[0] + shared[3], 4);
        assert_eq!(shared.iter().sum::<usize>(), 10);
    }

    #[test]
    fn ends_are_in_the_first_and_the_last_stage() {
        let (model, mut config) = (small(), small_plan());
        config.layout.layers_per_stage = vec![2, 1];
        let found = stages(&model, &config, |_| 1.0).unwrap();
        assert_eq!(found[0], [Part::Embedding, Part::Dense, Part::Moe]);
        let end = [
            Part::Moe,
            Part::Head,
            Part::Merge,
            Part::Moe,
            Part::SharedHead,
        ];
        assert_eq!(found[1], end);
    }

    #[test]
    fn lists_that_do_not_fit_are_refused() {
        let (model, mut config) = (small(), small_plan());
        config.layout.layers_per_stage = vec![2, 2];
        let error = stages(&model, &config, |_| 1.0).unwrap_err();
        assert_eq!(
            error.to_string(),
            "layout.layers_per_stage = [2, 2]: must be 2 numbers, one for each stage, that add up to \
             num_hidden_layers = 3 of the model"
        );
        config.layout.layers_per_stage = Vec::new();
        config.layout.pp = 4;
        let error = stages(&model, &config, |_| 1.0).unwrap_err();
        assert_eq!(
            error.to_string(),
            "layout.pp = 4: gives 4 stages, which must not be more than num_hidden_layers = 3 of the model"
        );
    }
}
