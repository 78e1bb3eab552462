//! One text from beginning to end.

use std::ops::ControlFlow;

use super::{Batch, BatchConfig, Event, Request};
use crate::engine::{Engine, EngineError, Generated};

/// Continues one text and hands the new text to `on_text` piece by piece, each as soon as it is decided.
///
/// # Errors
/// A prompt or options that do not fit the model, or a failure on the way.
pub fn generate(
    engine: &Engine,
    config: BatchConfig,
    request: Request,
    on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
) -> Result<Generated, EngineError> {
    let (mut text, mut tokens, mut result) = (String::new(), Vec::new(), None);
    let speculation = {
        let mut batch = Batch::new(engine, config);
        let listener = |event| match event {
            Event::Piece {
                text: piece,
                tokens: new,
            } => {
                text.push_str(&piece);
                tokens.extend(new.iter().map(|info| info.id));
                match piece.as_str() {
                    "" => ControlFlow::Continue(()),
                    piece => on_text(piece),
                }
            }
            Event::Finished(summary) => {
                result = Some(Ok(summary));
                ControlFlow::Continue(())
            }
            Event::Failed(error) => {
                result = Some(Err(error));
                ControlFlow::Continue(())
            }
        };
        batch.add(request, Box::new(listener))?;
        while !batch.is_idle() {
            batch.step();
        }
        batch.speculation()
    };
    let summary = result.expect("a text that is over was told so")?;
    Ok(Generated {
        text,
        tokens,
        summary,
        speculation,
    })
}
