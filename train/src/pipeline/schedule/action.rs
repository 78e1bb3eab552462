//! What a rank does: computations on chunks, and transfers to and from its neighbours.
//!
//! The short names are those of the report's section 3.2.1: F is a forward pass, B a backward pass, Bi the part of it
//! that gives the gradient of the input, W the part that gives the gradients of the weights, F&B an overlapped pair.

use std::{fmt, iter};

/// Which way a micro-batch goes through the ranks on its forward pass; its backward pass goes the other way.
///
/// In [`Route::BothWays`](super::Route::BothWays) these are the two ends that micro-batches enter at, in
/// [`Route::Folded`](super::Route::Folded) the way there and back of each micro-batch.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Direction {
    /// From rank 0 to the last.
    Ascending,
    /// From the last rank to rank 0.
    Descending,
}

impl Direction {
    /// Both, in the order of their indices.
    pub const BOTH: [Self; 2] = [Self::Ascending, Self::Descending];

    /// 0 for ascending, 1 for descending.
    pub fn index(self) -> usize {
        self as usize
    }
}

/// One micro-batch in one stage of a rank. Displayed as `direction.micro_batch`.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Chunk {
    /// Tells a rank's stages apart.
    pub direction: Direction,
    /// Counts from 0 in each direction.
    pub micro_batch: usize,
}

impl fmt::Display for Chunk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.direction.index(), self.micro_batch)
    }
}

/// One computation of a rank.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Action {
    /// F
    Forward(Chunk),
    /// B: the gradients of the input and of the weights.
    Backward(Chunk),
    /// Bi: the gradient of the input. That of the weights is put into a queue.
    BackwardInput(Chunk),
    /// W: the gradients of the weights that have been in the queue for longest.
    BackwardWeight(Chunk),
    /// F&B: a forward and a whole backward pass of different chunks, whose communication and computation overlap. An
    /// executor without overlap does the forward pass first.
    Overlapped {
        /// F
        forward: Chunk,
        /// B
        backward: Chunk,
    },
}

impl Action {
    /// The action itself, or the two of an overlapped pair.
    pub fn parts(self) -> impl Iterator<Item = Self> {
        let (first, second) = match self {
            Self::Overlapped { forward, backward } => {
                (Self::Forward(forward), Some(Self::Backward(backward)))
            }
            single => (single, None),
        };
        iter::once(first).chain(second)
    }

    /// What it computes with; of a pair, the chunk of the forward pass.
    pub fn chunk(self) -> Chunk {
        match self {
            Self::Forward(chunk)
            | Self::Backward(chunk)
            | Self::BackwardInput(chunk)
            | Self::BackwardWeight(chunk)
            | Self::Overlapped { forward: chunk, .. } => chunk,
        }
    }

    /// The pass whose result it hands on; W hands on nothing. Of a pair, the forward pass.
    pub fn pass(self) -> Option<Pass> {
        match self {
            Self::Forward(_) | Self::Overlapped { .. } => Some(Pass::Forward),
            Self::Backward(_) | Self::BackwardInput(_) => Some(Pass::Backward),
            Self::BackwardWeight(_) => None,
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Forward(chunk) => write!(f, "F{chunk}"),
            Self::Backward(chunk) => write!(f, "B{chunk}"),
            Self::BackwardInput(chunk) => write!(f, "Bi{chunk}"),
            Self::BackwardWeight(chunk) => write!(f, "W{chunk}"),
            Self::Overlapped { forward, backward } => write!(f, "F{forward}&B{backward}"),
        }
    }
}

/// What crosses from stage to stage: activations forward, gradients backward.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Pass {
    /// Activations.
    Forward,
    /// Gradients.
    Backward,
}

impl Pass {
    /// F or B.
    pub fn letter(self) -> char {
        match self {
            Self::Forward => 'F',
            Self::Backward => 'B',
        }
    }
}

/// Which side of a transfer a rank is on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum TransferKind {
    /// To the peer.
    Send,
    /// From the peer.
    Receive,
}

impl TransferKind {
    /// `send` or `recv`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Send => "send",
            Self::Receive => "recv",
        }
    }
}

/// One end of a point-to-point transfer between stages of different ranks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Transfer {
    /// Sent or received.
    pub kind: TransferKind,
    /// Activations or gradients.
    pub pass: Pass,
    /// The direction and micro-batch that they belong to.
    pub chunk: Chunk,
    /// The rank at the other end.
    pub peer: usize,
}

impl fmt::Display for Transfer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, pass) = (self.kind.name(), self.pass.letter());
        let to = match self.kind {
            TransferKind::Send => "to",
            TransferKind::Receive => "from",
        };
        write!(f, "{kind}{pass} {} {to} {}", self.chunk, self.peer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_a_forward_and_then_a_backward_pass() {
        let chunk = |direction, micro_batch| Chunk {
            direction,
            micro_batch,
        };
        let (forward, backward) = (
            chunk(Direction::Ascending, 3),
            chunk(Direction::Descending, 1),
        );
        let pair = Action::Overlapped { forward, backward };
        assert_eq!(pair.to_string(), "F0.3&B1.1");
        let parts: Vec<String> = pair.parts().map(|part| part.to_string()).collect();
        assert_eq!(parts, ["F0.3", "B1.1"]);
        let single = Action::BackwardInput(backward);
        assert!(single.parts().eq([single]));
    }
}
