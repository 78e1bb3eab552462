//! Which stages a rank has, and who their neighbours are.

use super::action::{Direction, Pass};

/// How the stages of a model lie on the ranks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Route {
    /// Stage r is on rank r.
    OneWay,
    /// As [`Route::OneWay`], and a second copy the other way round: stage r on the rank r before the last. Half of
    /// the micro-batches enter at either end.
    BothWays,
    /// Twice as many stages as ranks: stage r is on rank r, and from the last rank on they come back, so that rank r
    /// also has stage 2 x ranks - 1 - r.
    Folded,
}

/// A route through a number of ranks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Placement {
    /// The order of the stages.
    pub route: Route,
    /// How many ranks there are.
    pub ranks: usize,
}

/// Where the input of a stage comes from, or its output goes to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Neighbour {
    /// The end of the pipeline: the data on one side, the loss on the other.
    End,
    /// The other stage of the same rank.
    Local(Direction),
    /// The stage of the same direction on another rank.
    Rank(usize),
}

impl Placement {
    /// The directions that micro-batches go in.
    pub fn directions(self) -> &'static [Direction] {
        match self.route {
            Route::OneWay => &Direction::BOTH[..1],
            Route::BothWays | Route::Folded => &Direction::BOTH,
        }
    }

    /// How many stages the model has.
    pub fn stages(self) -> usize {
        match self.route {
            Route::OneWay | Route::BothWays => self.ranks,
            Route::Folded => 2 * self.ranks,
        }
    }

    /// Which of them `rank` has for a direction.
    pub fn stage(self, rank: usize, direction: Direction) -> usize {
        match direction {
            Direction::Ascending => rank,
            Direction::Descending => self.stages() - 1 - rank,
        }
    }

    /// Where the input of a pass comes from.
    pub fn input(self, rank: usize, pass: Pass, direction: Direction) -> Neighbour {
        match pass {
            Pass::Forward => self.before(rank, direction),
            Pass::Backward => self.after(rank, direction),
        }
    }

    /// Where the output of a pass goes to.
    pub fn output(self, rank: usize, pass: Pass, direction: Direction) -> Neighbour {
        match pass {
            Pass::Forward => self.after(rank, direction),
            Pass::Backward => self.before(rank, direction),
        }
    }

    fn before(self, rank: usize, direction: Direction) -> Neighbour {
        match (direction, self.route) {
            (Direction::Ascending, _) if rank > 0 => Neighbour::Rank(rank - 1),
            (Direction::Descending, _) if rank + 1 < self.ranks => Neighbour::Rank(rank + 1),
            (Direction::Descending, Route::Folded) => Neighbour::Local(Direction::Ascending),
            _ => Neighbour::End,
        }
    }

    fn after(self, rank: usize, direction: Direction) -> Neighbour {
        match (direction, self.route) {
            (Direction::Ascending, _) if rank + 1 < self.ranks => Neighbour::Rank(rank + 1),
            (Direction::Ascending, Route::Folded) => Neighbour::Local(Direction::Descending),
            (Direction::Descending, _) if rank > 0 => Neighbour::Rank(rank - 1),
            _ => Neighbour::End,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Follows a micro-batch from where it enters.
    fn stages(placement: Placement, mut direction: Direction) -> Vec<usize> {
        let mut rank = match direction {
            Direction::Ascending => 0,
            Direction::Descending => placement.ranks - 1,
        };
        let mut stages = Vec::new();
        loop {
            stages.push(placement.stage(rank, direction));
            match placement.output(rank, Pass::Forward, direction) {
                Neighbour::End => return stages,
                Neighbour::Local(other) => {
                    let back = placement.input(rank, Pass::Forward, other);
                    assert_eq!(back, Neighbour::Local(direction));
                    direction = other;
                }
                Neighbour::Rank(next) => {
                    let back = placement.input(next, Pass::Forward, direction);
                    assert_eq!(back, Neighbour::Rank(rank));
                    rank = next;
                }
            }
        }
    }

    #[test]
    fn every_route_passes_through_all_stages_in_order() {
        let placement = |route| Placement { route, ranks: 3 };
        let [ascending, descending] = Direction::BOTH;
        assert_eq!(stages(placement(Route::OneWay), ascending), [0, 1, 2]);
        assert_eq!(stages(placement(Route::BothWays), ascending), [0, 1, 2]);
        assert_eq!(stages(placement(Route::BothWays), descending), [0, 1, 2]);
        let folded = stages(placement(Route::Folded), ascending);
        assert_eq!(folded, [0, 1, 2, 3, 4, 5]);
    }
}
