//! What was compared, what came out of it, and what was not compared.

use std::fmt::Write;

use safetensors::{
    Dtype, SafeTensorError,
    tensor::{TensorView, serialize},
};
use serde_json::{Value, json};

use super::tolerance::Bound;

/// The results of all comparisons.
#[derive(Default)]
pub(super) struct Report {
    rows: Vec<Row>,
    skipped: Vec<Skipped>,
    keep: bool,
    computed: Vec<Computed>,
}

struct Row {
    file: String,
    name: String,
    shape: Vec<usize>,
    measure: Measure,
    passes: bool,
}

enum Measure {
    Errors(Errors, Bound),
    Differences(usize),
}

/// How far results are from their references.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Errors {
    max: f64,
    relative: f64,
    sum: f64,
    count: usize,
}

struct Skipped {
    file: String,
    names: Vec<String>,
    reason: &'static str,
}

struct Computed {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Errors {
    /// The errors of `found`; elements that are equal have none, infinities included.
    pub(super) fn between(found: &[f32], expected: &[f32]) -> Self {
        let mut errors = Self::default();
        for (&found, &expected) in found.iter().zip(expected) {
            // Infinities that are equal have no difference that is a number.
            let (error, relative) = if found == expected {
                (0.0, 0.0)
            } else {
                let error = (f64::from(found) - f64::from(expected)).abs();
                (error, error / f64::from(expected).abs())
            };
            errors.max = worse(errors.max, error);
            errors.relative = worse(errors.relative, relative);
            errors.sum += error;
            errors.count += 1;
        }
        errors
    }

    /// The errors of both sets of elements together.
    pub(super) fn and(self, other: Self) -> Self {
        Self {
            max: worse(self.max, other.max),
            relative: worse(self.relative, other.relative),
            sum: self.sum + other.sum,
            count: self.count + other.count,
        }
    }

    fn mean(&self) -> f64 {
        self.sum / self.count.max(1) as f64
    }

    fn within(&self, bound: Bound) -> bool {
        match bound {
            Bound::Max(limit) => self.max <= limit,
            Bound::Mean(limit) => self.mean() <= limit,
            Bound::Relative(limit) => self.relative <= limit,
        }
    }
}

impl Report {
    /// A report without rows; `keep` says whether computed tensors are held for [`Report::dump`].
    pub(super) fn new(keep: bool) -> Self {
        Self {
            keep,
            ..Self::default()
        }
    }

    /// Whether nothing was compared.
    pub(super) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Whether every comparison passed.
    pub(super) fn passes(&self) -> bool {
        self.rows.iter().all(|row| row.passes)
    }

    /// Adds a comparison of floats.
    pub(super) fn errors(
        &mut self,
        (file, name): (&str, &str),
        shape: &[usize],
        errors: Errors,
        bound: Bound,
    ) {
        let measure = Measure::Errors(errors, bound);
        self.row((file, name), shape, measure, errors.within(bound));
    }

    /// Adds an exact comparison.
    pub(super) fn differences(&mut self, place: (&str, &str), shape: &[usize], differences: usize) {
        self.row(
            place,
            shape,
            Measure::Differences(differences),
            differences == 0,
        );
    }

    fn row(&mut self, (file, name): (&str, &str), shape: &[usize], measure: Measure, passes: bool) {
        self.rows.push(Row {
            file: file.to_owned(),
            name: name.to_owned(),
            shape: shape.to_vec(),
            measure,
            passes,
        });
    }

    /// Adds references that were not compared.
    pub(super) fn skip(&mut self, file: &str, names: Vec<String>, reason: &'static str) {
        self.skipped.push(Skipped {
            file: file.to_owned(),
            names,
            reason,
        });
    }

    /// Holds computed floats for [`Report::dump`].
    pub(super) fn keep_floats(&mut self, place: (&str, &str), shape: &[usize], values: &[f32]) {
        self.keep(place, Dtype::F32, shape, || {
            values
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect()
        });
    }

    /// Holds computed integers for [`Report::dump`].
    pub(super) fn keep_ints(&mut self, place: (&str, &str), shape: &[usize], values: &[i64]) {
        self.keep(place, Dtype::I64, shape, || {
            values
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect()
        });
    }

    /// Holds computed codes for [`Report::dump`].
    pub(super) fn keep_codes(
        &mut self,
        place: (&str, &str),
        dtype: Dtype,
        shape: &[usize],
        codes: &[u8],
    ) {
        self.keep(place, dtype, shape, || codes.to_vec());
    }

    fn keep(
        &mut self,
        (file, name): (&str, &str),
        dtype: Dtype,
        shape: &[usize],
        bytes: impl FnOnce() -> Vec<u8>,
    ) {
        if self.keep {
            let stem = file.rsplit_once('.').map_or(file, |(stem, _)| stem);
            self.computed.push(Computed {
                name: format!("{stem}.{name}"),
                dtype,
                shape: shape.to_vec(),
                bytes: bytes(),
            });
        }
    }

    /// Everything that was computed, as the contents of a safetensors file.
    pub(super) fn dump(&self) -> anyhow::Result<Vec<u8>> {
        let views: Result<Vec<_>, SafeTensorError> = self
            .computed
            .iter()
            .map(|tensor| {
                let view = TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes)?;
                Ok((tensor.name.as_str(), view))
            })
            .collect();
        Ok(views.and_then(|views| serialize(views, None))?)
    }

    /// A table for people.
    pub(super) fn text(&self) -> String {
        let name_width = self.rows.iter().map(|row| row.name.len()).max();
        let name_width = name_width.unwrap_or_default().max(4);
        let shapes: Vec<String> = self
            .rows
            .iter()
            .map(|row| format!("{:?}", row.shape))
            .collect();
        let shape_width = shapes.iter().map(String::len).max();
        let shape_width = shape_width.unwrap_or_default().max(5);
        let mut text = String::new();
        let mut file = "";
        for (row, shape) in self.rows.iter().zip(&shapes) {
            if row.file != file {
                let gap = if file.is_empty() { "" } else { "\n" };
                file = &row.file;
                line(
                    &mut text,
                    format_args!(
                        "{gap}{file}\n  {:<name_width$}  {:<shape_width$}  {:>10}  {:>10}  tolerance",
                        "name", "shape", "max error", "mean error"
                    ),
                );
            }
            let (max, mean, tolerance) = row.measure.cells();
            let verdict = if row.passes { "PASS" } else { "FAIL" };
            line(
                &mut text,
                format_args!(
                    "  {:<name_width$}  {shape:<shape_width$}  {max:>10}  {mean:>10}  {tolerance:<14}  {verdict}",
                    row.name
                ),
            );
        }
        for skipped in &self.skipped {
            let (count, names) = (skipped.names.len(), skipped.names.join(", "));
            line(
                &mut text,
                format_args!(
                    "\n{}: {count} not verified, {}: {names}",
                    skipped.file, skipped.reason
                ),
            );
        }
        let failed = self.rows.iter().filter(|row| !row.passes).count();
        line(
            &mut text,
            format_args!(
                "\n{} verified: {} passed, {failed} failed; {} not verified",
                self.rows.len(),
                self.rows.len() - failed,
                self.skipped
                    .iter()
                    .map(|skipped| skipped.names.len())
                    .sum::<usize>()
            ),
        );
        text
    }

    /// The same for programs.
    pub(super) fn json(&self) -> Value {
        let failed = self.rows.iter().filter(|row| !row.passes).count();
        json!({
            "passed": self.rows.len() - failed,
            "failed": failed,
            "rows": self.rows.iter().map(Row::json).collect::<Vec<_>>(),
            "not_verified": self.skipped.iter().map(|skipped| json!({
                "file": skipped.file,
                "names": skipped.names,
                "count": skipped.names.len(),
                "reason": skipped.reason,
            })).collect::<Vec<_>>(),
        })
    }
}

impl Measure {
    fn cells(&self) -> (String, String, String) {
        match self {
            Self::Errors(errors, bound) => {
                let bound = match bound {
                    Bound::Max(limit) => format!("{limit:.0e}"),
                    Bound::Mean(limit) => format!("{limit:.0e} of mean"),
                    Bound::Relative(limit) => format!("{limit:.0e} relative"),
                };
                (
                    format!("{:.2e}", errors.max),
                    format!("{:.2e}", errors.mean()),
                    bound,
                )
            }
            Self::Differences(count) => (format!("{count} differ"), String::new(), "exact".into()),
        }
    }
}

impl Row {
    fn json(&self) -> Value {
        let mut value = json!({
            "file": self.file,
            "name": self.name,
            "shape": self.shape,
            "pass": self.passes,
        });
        match &self.measure {
            // What is no number becomes null.
            Measure::Errors(errors, bound) => {
                let (kind, limit) = match *bound {
                    Bound::Max(limit) => ("max_abs_error", limit),
                    Bound::Mean(limit) => ("mean_abs_error", limit),
                    Bound::Relative(limit) => ("max_relative_error", limit),
                };
                value["max_abs_error"] = json!(errors.max);
                value["mean_abs_error"] = json!(errors.mean());
                value["max_relative_error"] = json!(errors.relative);
                value["tolerance"] = json!({ "of": kind, "limit": limit });
            }
            Measure::Differences(count) => {
                value["differences"] = json!(count);
                value["tolerance"] = json!({ "of": "differences", "limit": 0 });
            }
        }
        value
    }
}

/// The larger error, or the one that is no number.
fn worse(a: f64, b: f64) -> f64 {
    if b > a || b.is_nan() { b } else { a }
}

fn line(text: &mut String, content: std::fmt::Arguments<'_>) {
    writeln!(text, "{content}").expect("a string takes whatever is written to it");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_measured_and_what_is_no_number_never_passes() {
        let errors = Errors::between(&[1.0, 2.5, 8.0], &[1.0, 2.0, 4.0]);
        assert_eq!(
            (errors.max, errors.mean(), errors.relative),
            (4.0, 1.5, 1.0)
        );
        assert!(errors.within(Bound::Max(4.0)) && !errors.within(Bound::Max(3.9)));
        assert!(errors.within(Bound::Mean(1.5)) && !errors.within(Bound::Mean(1.4)));
        assert!(errors.within(Bound::Relative(1.0)) && !errors.within(Bound::Relative(0.9)));

        let zero = Errors::between(&[f32::INFINITY, 0.0], &[f32::INFINITY, -0.0]);
        assert!(zero.within(Bound::Max(0.0)) && zero.within(Bound::Relative(0.0)));
        for wrong in [f32::NAN, f32::INFINITY] {
            let errors = Errors::between(&[wrong, 1.0], &[1.0, 1.0]).and(zero);
            for bound in [Bound::Max(9.0), Bound::Mean(9.0), Bound::Relative(9.0)] {
                assert!(!errors.within(bound), "{errors:?} {bound:?}");
            }
        }
    }

    #[test]
    fn rows_are_shown_with_their_verdict() {
        let mut report = Report::new(false);
        assert!(report.is_empty() && report.passes());
        let errors = Errors::between(&[1.5], &[1.0]);
        report.errors(("a.safetensors", "x"), &[1], errors, Bound::Max(0.5));
        report.differences(("a.safetensors", "tokens"), &[2, 3], 4);
        report.skip("b.json", vec!["all of it".to_owned()], "not known");
        assert!(!report.passes());
        let expected = "\
a.safetensors
  name    shape    max error  mean error  tolerance
  x       [1]        5.00e-1     5.00e-1  5e-1            PASS
  tokens  [2, 3]    4 differ              exact           FAIL

b.json: 1 not verified, not known: all of it

2 verified: 1 passed, 1 failed; 1 not verified
";
        assert_eq!(report.text(), expected);
        let json = report.json();
        assert_eq!((&json["passed"], &json["failed"]), (&json!(1), &json!(1)));
        assert_eq!(json["rows"][1]["differences"], 4);
        assert_eq!(json["not_verified"][0]["count"], 1);
    }
}
