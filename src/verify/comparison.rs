//! The comparison of one file: takes what is computed for it, and knows what is left at the end.

use std::collections::BTreeSet;

use burn::tensor::Tensor;
use safetensors::Dtype;

use super::{
    reference::ReferenceFile,
    report::{Errors, Report},
    tolerance::Bound,
};

/// Results are compared with the tensor of their name; those that the file does not have are dropped.
pub(super) struct Comparison<'a> {
    pub(super) file: &'a ReferenceFile,
    report: &'a mut Report,
    seen: BTreeSet<String>,
}

impl<'a> Comparison<'a> {
    /// A comparison with `file`, whose tensors `inputs` are not results.
    pub(super) fn new(file: &'a ReferenceFile, report: &'a mut Report, inputs: &[&str]) -> Self {
        Self {
            file,
            report,
            seen: inputs.iter().map(ToString::to_string).collect(),
        }
    }

    /// Compares a tensor, which is read from the device if there is something to compare it with.
    pub(super) fn tensor<const D: usize>(
        &mut self,
        name: &str,
        tensor: Tensor<D>,
        bound: Bound,
    ) -> anyhow::Result<()> {
        if self.file.has(name) {
            let shape = tensor.dims();
            self.floats(name, &shape, &values(tensor), bound)?;
        }
        Ok(())
    }

    /// Compares floats. Returns their errors.
    ///
    /// # Errors
    /// A reference of another shape or type.
    pub(super) fn floats(
        &mut self,
        name: &str,
        shape: &[usize],
        found: &[f32],
        bound: Bound,
    ) -> anyhow::Result<Errors> {
        if !self.file.has(name) {
            return Ok(Errors::default());
        }
        let errors = Errors::between(found, &self.file.floats(name, shape)?);
        let place = (self.file.name(), name);
        self.report.errors(place, shape, errors, bound);
        self.report.keep_floats(place, shape, found);
        self.seen.insert(name.to_owned());
        Ok(errors)
    }

    /// Compares integers.
    ///
    /// # Errors
    /// A reference of another shape or type.
    pub(super) fn ints(
        &mut self,
        name: &str,
        shape: &[usize],
        found: &[i64],
    ) -> anyhow::Result<()> {
        if !self.file.has(name) {
            return Ok(());
        }
        let expected = self.file.ints(name, shape)?;
        let differences = found.iter().zip(&expected).filter(|(a, b)| a != b).count();
        let place = (self.file.name(), name);
        self.report.differences(place, shape, differences);
        self.report.keep_ints(place, shape, found);
        self.seen.insert(name.to_owned());
        Ok(())
    }

    /// Compares codes of one byte each.
    ///
    /// # Errors
    /// A reference of another shape or type.
    pub(super) fn codes(
        &mut self,
        name: &str,
        dtype: Dtype,
        shape: &[usize],
        found: &[u8],
    ) -> anyhow::Result<()> {
        if self.file.has(name) {
            let expected = self.file.codes(name, dtype, shape)?;
            let differences = found.iter().zip(&expected).filter(|(a, b)| a != b).count();
            let place = (self.file.name(), name);
            self.report.differences(place, shape, differences);
            self.report.keep_codes(place, dtype, shape, found);
            self.seen.insert(name.to_owned());
        }
        Ok(())
    }

    /// Compares floats that are rounded in one way only. What is no number equals what is no number.
    ///
    /// # Errors
    /// A reference of another shape or type.
    pub(super) fn exact(
        &mut self,
        name: &str,
        shape: &[usize],
        found: &[f32],
    ) -> anyhow::Result<()> {
        if self.file.has(name) {
            let expected = self.file.floats(name, shape)?;
            let equal = |a: f32, b: f32| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
            let pairs = found.iter().zip(&expected);
            let differences = pairs.filter(|&(&a, &b)| !equal(a, b)).count();
            let place = (self.file.name(), name);
            self.report.differences(place, shape, differences);
            self.report.keep_floats(place, shape, found);
            self.seen.insert(name.to_owned());
        }
        Ok(())
    }

    /// Adds a row about several tensors together.
    pub(super) fn together(&mut self, name: &str, errors: Errors, bound: Bound) {
        self.report
            .errors((self.file.name(), name), &[], errors, bound);
    }

    /// Lists what nothing was computed for.
    pub(super) fn finish(self) {
        let left = |informative: bool| -> Vec<String> {
            let names = self.file.names().into_iter();
            names
                .filter(|name| !self.seen.contains(*name) && is_informative(name) == informative)
                .map(str::to_owned)
                .collect()
        };
        let reasons = [
            (true, "informative only"),
            (false, "not known for this model"),
        ];
        for (informative, reason) in reasons {
            let names = left(informative);
            if !names.is_empty() {
                self.report.skip(self.file.name(), names, reason);
            }
        }
    }
}

/// What other choices would give, and arithmetic of low precision, which may choose other experts.
fn is_informative(name: &str) -> bool {
    name.starts_with("variant.") || name == "logits_bf16_compute"
}

/// The elements of a tensor.
pub(super) fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}
