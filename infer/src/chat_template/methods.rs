//! Methods of Python's values.

use minijinja::{Error, State, Value};
use minijinja_contrib::pycompat;

/// Calls a method that the template language itself does not have.
pub(super) fn call(
    state: &mut State<'_, '_>,
    value: &Value,
    method: &str,
    arguments: &[Value],
) -> Result<Value, Error> {
    match (value.as_str(), method, arguments) {
        // There a word ends at white space only.
        (Some(text), "title", []) => Ok(title(text).into()),
        _ => pycompat::unknown_method_callback(state, value, method, arguments),
    }
}

/// Python's `str.title`: letters after letters are small, others capital.
fn title(text: &str) -> String {
    let mut in_word = false;
    let mut titled = String::with_capacity(text.len());
    for letter in text.chars() {
        if in_word {
            titled.extend(letter.to_lowercase());
        } else {
            titled.extend(letter.to_uppercase());
        }
        in_word = letter.is_lowercase() || letter.is_uppercase();
    }
    titled
}
