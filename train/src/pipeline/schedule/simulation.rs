//! When each action starts and ends, if its duration is known.
//!
//! An action starts when the one before is done and its inputs are there. Transfers are free for the ranks: an output
//! is at its receiver `communication` after the end of the action that computed it, and nobody waits for a send.

use super::{
    Refused,
    action::{Action, Chunk, Pass},
    placement::Neighbour,
    timeline::Timeline,
    validate::Violation,
};

/// How long it takes to compute a stage of one micro-batch, and to send the result; in any unit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Costs {
    /// F
    pub forward: f64,
    /// B
    pub backward: f64,
    /// Bi
    pub backward_input: f64,
    /// W
    pub backward_weight: f64,
    /// F&B
    pub overlapped: f64,
    /// From the end of an action to the presence of its output on another rank.
    pub communication: f64,
}

impl Costs {
    /// A backward pass is twice a forward pass, half of it for the weights, and overlap saves nothing.
    pub const UNIT: Self = Self {
        forward: 1.0,
        backward: 2.0,
        backward_input: 1.0,
        backward_weight: 1.0,
        overlapped: 3.0,
        communication: 0.0,
    };

    /// What is expected of them.
    ///
    /// # Errors
    /// A cost that is negative, no number or too large, or a pass that costs nothing.
    pub fn check(&self) -> Result<(), Refused> {
        const LARGEST: f64 = 1e9;
        for (field, value, positive) in [
            ("F", self.forward, true),
            ("B", self.backward, true),
            ("Bi", self.backward_input, false),
            ("W", self.backward_weight, false),
            ("FB", self.overlapped, true),
            ("communication", self.communication, false),
        ] {
            let rule = if positive {
                "must be a number above 0, at most 1e9"
            } else {
                "must be a number from 0 to 1e9"
            };
            if !(0.0..=LARGEST).contains(&value) || positive && value == 0.0 {
                return Err(Refused {
                    field,
                    value: value.to_string(),
                    rule: rule.to_owned(),
                });
            }
        }
        Ok(())
    }

    /// The same for stages that are `factor` times as large. What is sent stays the same.
    #[must_use]
    pub fn scaled(self, factor: f64) -> Self {
        Self {
            forward: self.forward * factor,
            backward: self.backward * factor,
            backward_input: self.backward_input * factor,
            backward_weight: self.backward_weight * factor,
            overlapped: self.overlapped * factor,
            communication: self.communication,
        }
    }

    /// The cost of an action.
    pub fn of(&self, action: Action) -> f64 {
        match action {
            Action::Forward(_) => self.forward,
            Action::Backward(_) => self.backward,
            Action::BackwardInput(_) => self.backward_input,
            Action::BackwardWeight(_) => self.backward_weight,
            Action::Overlapped { .. } => self.overlapped,
        }
    }
}

/// When an action is computed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Span {
    /// When it starts; the batch starts at 0.
    pub start: f64,
    /// When it is done.
    pub end: f64,
}

/// The times of a timeline.
#[derive(Clone, Debug, PartialEq)]
pub struct Simulation {
    /// By rank and step.
    pub spans: Vec<Vec<Span>>,
    /// When the last action is done.
    pub makespan: f64,
    /// By rank: how much of that time it has nothing to do.
    pub bubble: Vec<f64>,
}

/// Times a timeline whose stages all cost the same.
///
/// # Errors
/// A timeline that is not valid.
pub fn simulate(timeline: &Timeline, costs: &Costs) -> Result<Simulation, Violation> {
    simulate_uneven(timeline, costs.communication, |_, action| costs.of(action))
}

/// Times a timeline, given how long each rank takes for each action.
///
/// # Errors
/// A timeline that is not valid.
pub fn simulate_uneven(
    timeline: &Timeline,
    communication: f64,
    cost: impl Fn(usize, Action) -> f64,
) -> Result<Simulation, Violation> {
    timeline.validate()?;
    let mut ends = Ends::new(timeline);
    let mut spans: Vec<Vec<Span>> = vec![Vec::new(); timeline.ranks.len()];
    let mut moved = true;
    while moved {
        moved = false;
        for (rank, spans) in spans.iter_mut().enumerate() {
            while let Some(step) = timeline.ranks[rank].steps.get(spans.len())
                && let Some(ready) = ends.ready(rank, step.action, communication)
            {
                let free = spans.last().map_or(0.0, |span| span.end);
                let start = f64::max(free, ready);
                let end = start + cost(rank, step.action);
                spans.push(Span { start, end });
                ends.set(rank, step.action, end);
                moved = true;
            }
        }
    }
    let makespan = spans
        .iter()
        .filter_map(|spans| Some(spans.last()?.end))
        .fold(0.0, f64::max);
    let busy = timeline.ranks.iter().enumerate().map(|(rank, steps)| {
        let costs = steps.steps.iter().map(|step| cost(rank, step.action));
        costs.sum::<f64>()
    });
    Ok(Simulation {
        bubble: busy.map(|busy| makespan - busy).collect(),
        makespan,
        spans,
    })
}

/// When outputs were computed, by pass, direction, micro-batch and rank.
struct Ends<'a> {
    timeline: &'a Timeline,
    ends: Vec<Option<f64>>,
}

impl<'a> Ends<'a> {
    fn new(timeline: &'a Timeline) -> Self {
        let chunks = 4 * timeline.micro_batches * timeline.ranks.len();
        Self {
            timeline,
            ends: vec![None; chunks],
        }
    }

    fn index(&self, rank: usize, pass: Pass, chunk: Chunk) -> usize {
        let lane = 2 * (pass as usize) + chunk.direction.index();
        let row = lane * self.timeline.micro_batches + chunk.micro_batch;
        row * self.timeline.ranks.len() + rank
    }

    /// When all inputs are there, unless one of them is not computed yet.
    fn ready(&self, rank: usize, action: Action, communication: f64) -> Option<f64> {
        let mut ready = 0.0;
        for part in action.parts() {
            // The order of the steps alone decides about W, and about B after F on the same rank.
            let Some(pass) = part.pass() else { continue };
            let chunk = part.chunk();
            let direction = chunk.direction;
            let input = match self.timeline.placement.input(rank, pass, direction) {
                Neighbour::End => 0.0,
                Neighbour::Local(direction) => {
                    self.ends[self.index(rank, pass, Chunk { direction, ..chunk })]?
                }
                Neighbour::Rank(peer) => self.ends[self.index(peer, pass, chunk)]? + communication,
            };
            ready = f64::max(ready, input);
        }
        Some(ready)
    }

    fn set(&mut self, rank: usize, action: Action, end: f64) {
        for part in action.parts() {
            if let Some(pass) = part.pass() {
                let index = self.index(rank, pass, part.chunk());
                self.ends[index] = Some(end);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::schedule::Schedule;

    /// By hand: two ranks, two micro-batches, and half a unit for each transfer.
    ///
    /// ```text
    /// rank 0  F0 F1                B0   .. B1
    /// rank 1  ..  F0  B0   F1  B1
    /// ```
    #[test]
    fn transfers_take_their_time() {
        let timeline = Schedule::OneFOneB.timeline(2, 2).unwrap();
        let costs = Costs {
            communication: 0.5,
            ..Costs::UNIT
        };
        let simulation = simulate(&timeline, &costs).unwrap();
        let starts: Vec<Vec<f64>> = simulation
            .spans
            .iter()
            .map(|spans| spans.iter().map(|span| span.start).collect())
            .collect();
        assert_eq!(timeline.order()[0], ["F0.0", "F0.1", "B0.0", "B0.1"]);
        assert_eq!(starts[0], [0.0, 1.0, 5.0, 8.0]);
        assert_eq!(timeline.order()[1], ["F0.0", "B0.0", "F0.1", "B0.1"]);
        assert_eq!(starts[1], [1.5, 2.5, 4.5, 5.5]);
        assert_eq!(
            (simulation.makespan, simulation.bubble),
            (10.0, vec![4.0; 2])
        );
    }

    /// By hand: rank 1 takes three times as long as rank 0, so that rank 0 waits for it.
    ///
    /// ```text
    /// rank 0  FF........BB.......BB
    /// rank 1  .FFFBBBBBBFFFBBBBBB..
    /// ```
    #[test]
    fn ranks_may_take_different_times() {
        let timeline = Schedule::OneFOneB.timeline(2, 2).unwrap();
        let cost = |rank, action| Costs::UNIT.of(action) * [1.0, 3.0][rank];
        let simulation = simulate_uneven(&timeline, 0.0, cost).unwrap();
        let starts = |rank: usize| -> Vec<f64> {
            let spans = simulation.spans[rank].iter();
            spans.map(|span| span.start).collect()
        };
        assert_eq!(starts(0), [0.0, 1.0, 10.0, 19.0]);
        assert_eq!(starts(1), [1.0, 4.0, 10.0, 13.0]);
        assert_eq!(simulation.makespan, 21.0);
        assert_eq!(simulation.bubble, [15.0, 3.0]);
    }

    #[test]
    fn costs_are_numbers_that_something_can_take() {
        assert_eq!(Costs::UNIT.check(), Ok(()));
        for (costs, expected) in [
            (
                Costs {
                    forward: 0.0,
                    ..Costs::UNIT
                },
                "F = 0: must be a number above 0, at most 1e9",
            ),
            (
                Costs {
                    backward_input: f64::NAN,
                    ..Costs::UNIT
                },
                "Bi = NaN: must be a number from 0 to 1e9",
            ),
            (
                Costs {
                    communication: -1.0,
                    ..Costs::UNIT
                },
                "communication = -1: must be a number from 0 to 1e9",
            ),
        ] {
            assert_eq!(costs.check().unwrap_err().to_string(), expected);
        }
    }
}
