//! All schedules for the same model, ranks and micro-batches, beside the closed formulas of the report's table 2.

use deepburn_train::pipeline::schedule::{Refused, Schedule};
use serde_json::{Value, json};

use super::{Plan, line, number};

const NOTES: &str = "\
cost: of a stage, relative to those above; parameters: the part of the model that a rank has; bubble: the longest that a
rank has nothing to do; activations: the most that a rank keeps, of what one micro-batch needs in the whole model;
formula: table 2 of the technical report, exact for F = Bi = W = B / 2, F&B from B to F + B and no communication time.
";

pub(super) struct Row {
    schedule: Schedule,
    /// Of the model.
    stages: usize,
    /// Relative to the stages of the schedule that was asked for.
    scale: f64,
    outcome: Result<Outcome, Refused>,
}

struct Outcome {
    makespan: f64,
    bubble: f64,
    bubble_formula: f64,
    activations: usize,
    activations_formula: usize,
}

/// One row for each schedule, with the costs of `plan` in proportion to its stages.
pub(super) fn rows(plan: &Plan) -> anyhow::Result<Vec<Row>> {
    let ranks = plan.ranks();
    let row = |schedule: Schedule| {
        let stages = schedule.placement(ranks).stages();
        let scale = plan.timeline.placement.stages() as f64 / stages as f64;
        let costs = plan.costs.scaled(scale);
        let outcome = match Plan::new(schedule, ranks, plan.micro_batches, costs) {
            Ok(plan) => Ok(Outcome {
                makespan: plan.simulation.makespan,
                bubble: plan.bubble(),
                bubble_formula: schedule.bubble(ranks, &costs),
                activations: plan
                    .timeline
                    .peak_activations()
                    .into_iter()
                    .max()
                    .unwrap_or(0),
                activations_formula: schedule.activations(ranks),
            }),
            Err(error) => Err(error.downcast::<Refused>()?),
        };
        Ok(Row {
            schedule,
            stages,
            scale,
            outcome,
        })
    };
    Schedule::ALL.into_iter().map(row).collect()
}

pub(super) fn text(rows: &[Row]) -> String {
    let mut text = String::new();
    line(
        &mut text,
        format_args!(
            "{:<10}{:>6}{:>12}{:>12}{:>12}{:>12}{:>13}{:>10}",
            "schedule",
            "cost",
            "parameters",
            "makespan",
            "bubble",
            "formula",
            "activations",
            "formula"
        ),
    );
    for row in rows {
        let part = |count: usize| format!("{count}/{}", row.stages);
        let start = format!(
            "{:<10}{:>6}{:>12}",
            row.schedule.name(),
            format!("x {}", number(row.scale)),
            part(row.schedule.stages_per_rank())
        );
        match &row.outcome {
            Ok(outcome) => line(
                &mut text,
                format_args!(
                    "{start}{:>12}{:>12}{:>12}{:>13}{:>10}",
                    number(outcome.makespan),
                    number(outcome.bubble),
                    number(outcome.bubble_formula),
                    part(outcome.activations),
                    part(outcome.activations_formula)
                ),
            ),
            Err(refused) => line(&mut text, format_args!("{start}    {refused}")),
        }
    }
    text + "\n" + NOTES
}

pub(super) fn json(rows: &[Row]) -> Value {
    rows.iter()
        .map(|row| {
            let mut value = json!({
                "schedule": row.schedule.name(),
                "stages": row.stages,
                "cost_of_a_stage": row.scale,
                "stages_per_rank": row.schedule.stages_per_rank(),
            });
            match &row.outcome {
                Ok(outcome) => {
                    value["makespan"] = json!(outcome.makespan);
                    value["bubble"] = json!(outcome.bubble);
                    value["bubble_formula"] = json!(outcome.bubble_formula);
                    value["peak_activations"] = json!(outcome.activations);
                    value["peak_activations_formula"] = json!(outcome.activations_formula);
                }
                Err(refused) => value["refused"] = json!(refused.to_string()),
            }
            value
        })
        .collect()
}
