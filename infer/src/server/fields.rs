//! The fields of a JSON object, each taken by its name, so that every complaint names the field and none is ignored.

use std::{fmt::Display, ops::RangeInclusive};

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::error::ApiError;

/// What is left of an object whose fields are being taken.
#[derive(Debug)]
pub(super) struct Fields {
    /// Where the object is in the request: empty, or with a dot at its end.
    path: String,
    map: Map<String, Value>,
}

impl Fields {
    /// The fields of a request's body.
    pub(super) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(map)) => Ok(Self {
                path: String::new(),
                map,
            }),
            Ok(_) => Err(ApiError::invalid("the body must be a JSON object")),
            Err(error) => Err(ApiError::invalid(format!("the body is not JSON: {error}"))),
        }
    }

    /// A complaint about the field `name` of this object.
    pub(super) fn wrong(&self, name: &str, what: impl Display) -> ApiError {
        ApiError::field(format!("{}{name}", self.path), what)
    }

    /// Whether a field is there.
    pub(super) fn has(&self, name: &str) -> bool {
        self.map.get(name).is_some_and(|value| !value.is_null())
    }

    /// The value of a field; null is the same as none.
    pub(super) fn take<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>, ApiError> {
        match self.map.remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match serde_json::from_value(value) {
                Ok(value) => Ok(Some(value)),
                Err(error) => Err(self.wrong(name, error)),
            },
        }
    }

    /// As [`Fields::take`], for a field that must be there.
    pub(super) fn require<T: DeserializeOwned>(&mut self, name: &str) -> Result<T, ApiError> {
        self.take(name)?
            .ok_or_else(|| self.wrong(name, "is missing"))
    }

    /// A number between two others, both included.
    pub(super) fn within<T>(
        &mut self,
        name: &str,
        range: RangeInclusive<T>,
    ) -> Result<Option<T>, ApiError>
    where
        T: DeserializeOwned + PartialOrd + Display,
    {
        match self.take(name)? {
            Some(value) if !range.contains(&value) => {
                let (low, high) = (range.start(), range.end());
                let what = format!("is {value}: must be between {low} and {high}");
                Err(self.wrong(name, what))
            }
            value => Ok(value),
        }
    }

    /// The fields of an object in this one.
    pub(super) fn object(&mut self, name: &str) -> Result<Option<Self>, ApiError> {
        let map = self.take(name)?;
        let path = format!("{}{name}.", self.path);
        Ok(map.map(|map| Self { path, map }))
    }

    /// The fields of each object of a list.
    pub(super) fn objects(&mut self, name: &str) -> Result<Option<Vec<Self>>, ApiError> {
        let list = self.take(name)?;
        list.map(|list| self.nested(name, list)).transpose()
    }

    /// The fields of each object of a list that was the value of `name`.
    pub(super) fn nested(&self, name: &str, list: Value) -> Result<Vec<Self>, ApiError> {
        let Value::Array(list) = list else {
            return Err(self.wrong(name, "must be a list"));
        };
        let numbered = list.into_iter().enumerate();
        let object = |(at, value)| match value {
            Value::Object(map) => Ok(Self {
                path: format!("{}{name}[{at}].", self.path),
                map,
            }),
            _ => Err(self.wrong(&format!("{name}[{at}]"), "must be an object")),
        };
        numbered.map(object).collect()
    }

    /// Refuses a field unless it asks for nothing: null, false, or empty.
    pub(super) fn refuse(&mut self, name: &str, why: &str) -> Result<(), ApiError> {
        let asks = match self.map.remove(name) {
            None | Some(Value::Null | Value::Bool(false)) => false,
            Some(Value::Array(list)) => !list.is_empty(),
            Some(Value::Object(map)) => !map.is_empty(),
            Some(Value::String(text)) => !text.is_empty(),
            Some(Value::Bool(true) | Value::Number(_)) => true,
        };
        if asks {
            return Err(self.wrong(name, why));
        }
        Ok(())
    }

    /// Ends the object; any field that nobody took is one too many.
    pub(super) fn finish(self) -> Result<(), ApiError> {
        match self.map.keys().next() {
            Some(name) => Err(self.wrong(name, "is not a field that this server knows")),
            None => Ok(()),
        }
    }
}
