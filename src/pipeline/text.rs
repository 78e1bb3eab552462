//! A timeline in letters: one line per rank, as wide as it takes long.

use deepburn_train::pipeline::schedule::{Action, Chunk};

use super::{Plan, cased, line};

/// More columns than this are of no use to anybody.
const WIDEST: f64 = 2000.0;

/// The timeline, unless it is too wide.
pub(super) fn timeline(plan: &Plan) -> Option<String> {
    let scale = columns_per_time(plan);
    if scale * plan.simulation.makespan > WIDEST {
        return None;
    }
    let column = |time: f64| (time * scale).round() as usize;
    let digits = (plan.ranks() - 1).to_string().len();
    let mut text = String::new();
    for (rank, spans) in plan.simulation.spans.iter().enumerate() {
        let mut row = String::new();
        for (step, span) in plan.timeline.ranks[rank].steps.iter().zip(spans) {
            let (start, end) = (column(span.start), column(span.end));
            row.extend((row.len()..start).map(|_| '.'));
            if end > start {
                row += &label(step.action);
            }
            row.extend((row.len()..end).map(|_| '-'));
        }
        let end = column(plan.simulation.makespan);
        row.extend((row.len()..end).map(|_| '.'));
        line(&mut text, format_args!("rank {rank:>digits$}  {row}"));
    }
    Some(text)
}

/// So many that every label fits.
fn columns_per_time(plan: &Plan) -> f64 {
    let steps = plan.timeline.ranks.iter().flat_map(|rank| &rank.steps);
    let needed = steps.map(|step| (label(step.action).len(), plan.costs.of(step.action)));
    needed
        .filter(|(_, cost)| *cost > 0.0)
        .map(|(width, cost)| width as f64 / cost)
        .fold(0.0, f64::max)
}

fn label(action: Action) -> String {
    let name = |letter, chunk: Chunk| {
        let letter = cased(letter, chunk.direction);
        format!("{letter}{}", chunk.micro_batch)
    };
    match action {
        Action::Forward(chunk) => name('F', chunk),
        Action::Backward(chunk) => name('B', chunk),
        Action::BackwardInput(chunk) => name('I', chunk),
        Action::BackwardWeight(chunk) => name('W', chunk),
        Action::Overlapped { forward, backward } => {
            format!("{}&{}", name('F', forward), name('B', backward))
        }
    }
}
