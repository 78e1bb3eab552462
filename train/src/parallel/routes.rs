//! The way of every token to its experts and back, over at most two hops (report, section 3.2.2).
//!
//! A token crosses to each node that has some of its experts once, to the rank with the same in-node index as its own: the
//! relay. The relay hands it to those ranks of its node that have its experts. On the way back the relay sums what these
//! ranks computed, so that one row per token and node returns. Since a router limits a token to `topk_group` groups of
//! experts, and no group lies on two nodes, a token crosses to no more than `topk_group` nodes.

use super::{
    communicator::{CommError, Communicator, Kind, Transfer},
    mesh::ExpertPlacement,
    wire::Row,
};

/// An expert that is elsewhere.
const NONE: u16 = u16::MAX;

/// The experts that a rank can name on the wire.
pub const MOST_EXPERTS: usize = NONE as usize;

/// Where the tokens of this rank go, which tokens it relays, and which come to its experts.
#[derive(Clone, Debug, Default)]
pub struct Routes {
    tokens: usize,
    /// For each node the relay there and the tokens that cross to it, in order.
    out: Vec<(usize, Vec<usize>)>,
    /// As a relay: ranks that send here, and how many rows.
    through: Vec<(usize, usize)>,
    /// As a relay: ranks of this node, and which of the rows that pass through each gets.
    fan: Vec<(usize, Vec<usize>)>,
    /// Relays of this node, and how many rows come from each.
    arrivals: Vec<(usize, usize)>,
    /// The place of each row that arrives when all are in the order of their rank and token.
    places: Vec<usize>,
    /// For each row in that order and each choice of its token, the expert, counted from this rank's first, if it is here.
    chosen: Vec<Option<usize>>,
}

impl Routes {
    /// Tells all ranks what they will receive.
    ///
    /// # Errors
    /// As [`Communicator::transfer`].
    ///
    /// # Panics
    /// If the group is not as large as the placement, or an expert is not in it.
    pub fn plan(
        group: &dyn Communicator,
        placement: &ExpertPlacement,
        chosen: &[usize],
        k: usize,
    ) -> Result<Self, CommError> {
        let (rank, size) = (group.rank(), group.size());
        assert_eq!(size, placement.ranks(), "ranks with experts");
        let tokens = chosen.len() / k.max(1);
        let node = placement.node(rank);

        let mut out = Vec::new();
        let mut messages = vec![Vec::new(); size];
        for node in 0..placement.nodes() {
            let relay = placement.relay(rank, node);
            let there = |expert: usize| placement.node_of_expert(expert) == node;
            let mut crossing = Vec::new();
            for (token, experts) in chosen.chunks(k.max(1)).enumerate() {
                if experts.iter().any(|&expert| there(expert)) {
                    crossing.push(token);
                    let named = experts
                        .iter()
                        .map(|&e| if there(e) { e as u16 } else { NONE });
                    messages[relay].extend(named.flat_map(u16::to_le_bytes));
                }
            }
            out.push((relay, crossing));
        }
        let passing = group.all_to_all_v(&messages)?;

        let words = |bytes: &[u8]| -> Vec<u16> {
            let words = bytes.chunks_exact(2);
            words
                .map(|word| u16::from_le_bytes([word[0], word[1]]))
                .collect()
        };
        let mut through = Vec::new();
        let mut fan: Vec<(usize, Vec<usize>)> = (0..size)
            .filter(|&rank| placement.node(rank) == node)
            .map(|rank| (rank, Vec::new()))
            .collect();
        let mut messages = vec![Vec::new(); size];
        let mut row = 0;
        for (source, bytes) in passing.iter().enumerate() {
            let words = words(bytes);
            if !words.is_empty() {
                through.push((source, words.len() / k));
            }
            for experts in words.chunks(k.max(1)) {
                for (rank, rows) in &mut fan {
                    let here =
                        |expert: u16| expert != NONE && placement.owner(expert.into()) == *rank;
                    if experts.iter().any(|&expert| here(expert)) {
                        rows.push(row);
                        let named = experts.iter().map(|&e| if here(e) { e } else { NONE });
                        let words = [source as u16].into_iter().chain(named);
                        messages[*rank].extend(words.flat_map(u16::to_le_bytes));
                    }
                }
                row += 1;
            }
        }
        let arriving = group.all_to_all_v(&messages)?;

        let first = placement.experts_of(rank).start;
        let mut arrivals = Vec::new();
        let mut rows = Vec::new();
        for (relay, bytes) in arriving.iter().enumerate() {
            let words = words(bytes);
            if !words.is_empty() {
                arrivals.push((relay, words.len() / (k + 1)));
            }
            rows.extend(words.chunks(k + 1).map(<[u16]>::to_vec));
        }
        // All rows of a rank come through one relay and in order.
        let mut by_source: Vec<usize> = (0..rows.len()).collect();
        by_source.sort_by_key(|&arrival| rows[arrival][0]);
        let mut places = vec![0; rows.len()];
        for (place, &arrival) in by_source.iter().enumerate() {
            places[arrival] = place;
        }
        let choices = by_source.iter().flat_map(|&arrival| &rows[arrival][1..]);
        let local = |&expert: &u16| (expert != NONE).then(|| usize::from(expert) - first);
        Ok(Self {
            tokens,
            out,
            through,
            fan,
            arrivals,
            chosen: choices.map(local).collect(),
            places,
        })
    }

    /// Tokens of this rank.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Rows that come to this rank's experts, one for each token that needs any of them.
    pub fn rows(&self) -> usize {
        self.places.len()
    }

    /// For each of these rows, in the order of rank and token, and each choice, the expert if it is this rank's.
    pub fn chosen(&self) -> &[Option<usize>] {
        &self.chosen
    }

    /// Brings a row of each token to the ranks of its experts.
    ///
    /// # Errors
    /// As [`Communicator::transfer`].
    pub fn scatter(
        &self,
        group: &dyn Communicator,
        row: Row,
        tokens: &[f32],
    ) -> Result<Vec<f32>, CommError> {
        let (numbers, bytes) = (row.numbers(), row.bytes());
        let encoded = encode(row, tokens);
        let pick = |from: &[u8], rows: &[usize]| -> Vec<u8> {
            let mut picked = Vec::with_capacity(rows.len() * bytes);
            for at in rows {
                picked.extend_from_slice(&from[at * bytes..][..bytes]);
            }
            picked
        };
        let sends = self
            .out
            .iter()
            .map(|(to, rows)| (*to, pick(&encoded, rows)));
        let passing = exchange(group, sends.collect(), &self.through, bytes)?.concat();
        let sends = self
            .fan
            .iter()
            .map(|(to, rows)| (*to, pick(&passing, rows)));
        let arrived = exchange(group, sends.collect(), &self.arrivals, bytes)?.concat();
        let mut rows = vec![0.0; self.rows() * numbers];
        for (bytes, place) in arrived.chunks_exact(bytes.max(1)).zip(&self.places) {
            let out = &mut rows[place * numbers..][..numbers];
            row.decode(bytes, |at, number| out[at] = number);
        }
        Ok(rows)
    }

    /// The reverse, which is also the transpose: sums for each token the rows of the ranks that it went to. In the order of
    /// the ranks in a node, and then of the nodes.
    ///
    /// # Errors
    /// As [`Communicator::transfer`].
    pub fn gather(
        &self,
        group: &dyn Communicator,
        row: Row,
        rows: &[f32],
    ) -> Result<Vec<f32>, CommError> {
        let (numbers, bytes) = (row.numbers(), row.bytes());
        let mut places = self.places.iter();
        let sends = self.arrivals.iter().map(|&(to, count)| {
            let mut message = Vec::with_capacity(count * bytes);
            for place in places.by_ref().take(count) {
                row.encode(&rows[place * numbers..][..numbers], &mut message);
            }
            (to, message)
        });
        let fan: Vec<(usize, usize)> = counts(&self.fan);
        let passing = exchange(group, sends.collect(), &fan, bytes)?;
        let through = self.through.iter().map(|(_, rows)| rows).sum::<usize>();
        let mut sums = vec![0.0; through * numbers];
        for ((_, targets), message) in self.fan.iter().zip(&passing) {
            add_rows(row, message, targets, &mut sums);
        }
        let mut start = 0;
        let sends = self.through.iter().map(|&(to, count)| {
            let own = &sums[start * numbers..][..count * numbers];
            start += count;
            (to, encode(row, own))
        });
        let returning = exchange(group, sends.collect(), &counts(&self.out), bytes)?;
        let mut tokens = vec![0.0; self.tokens * numbers];
        for ((_, targets), message) in self.out.iter().zip(&returning) {
            add_rows(row, message, targets, &mut tokens);
        }
        Ok(tokens)
    }
}

fn counts(lists: &[(usize, Vec<usize>)]) -> Vec<(usize, usize)> {
    lists
        .iter()
        .map(|(rank, rows)| (*rank, rows.len()))
        .collect()
}

fn encode(row: Row, rows: &[f32]) -> Vec<u8> {
    let count = rows.len() / row.numbers().max(1);
    let mut bytes = Vec::with_capacity(count * row.bytes());
    for numbers in rows.chunks_exact(row.numbers().max(1)) {
        row.encode(numbers, &mut bytes);
    }
    bytes
}

/// Adds each encoded row to the row that `targets` names.
fn add_rows(row: Row, message: &[u8], targets: &[usize], sums: &mut [f32]) {
    let numbers = row.numbers();
    for (bytes, target) in message.chunks_exact(row.bytes().max(1)).zip(targets) {
        let sum = &mut sums[target * numbers..][..numbers];
        row.decode(bytes, |at, number| sum[at] += number);
    }
}

/// Sends messages to ranks and receives a known number of rows from others, in the order of `from`. No two messages are
/// for one rank.
fn exchange(
    group: &dyn Communicator,
    mut sends: Vec<(usize, Vec<u8>)>,
    from: &[(usize, usize)],
    row_bytes: usize,
) -> Result<Vec<Vec<u8>>, CommError> {
    let rank = group.rank();
    let mut received: Vec<Vec<u8>> = from
        .iter()
        .map(|&(from, rows)| vec![0; if from == rank { 0 } else { rows * row_bytes }])
        .collect();
    let own = sends.iter().position(|(to, _)| *to == rank);
    let own = own.map(|at| sends.swap_remove(at).1);
    let receives = from.iter().zip(&mut received);
    let receives = receives.filter(|(_, into)| !into.is_empty());
    let receives = receives.map(|(&(from, _), into)| Transfer::Receive { from, into });
    let sends = sends.iter().filter(|(_, bytes)| !bytes.is_empty());
    let sends = sends.map(|(to, bytes)| Transfer::Send { to: *to, bytes });
    let mut transfers: Vec<Transfer> = sends.chain(receives).collect();
    group.transfer(Kind::AllToAll, &mut transfers)?;
    if let (Some(own), Some(at)) = (own, from.iter().position(|(from, _)| *from == rank)) {
        received[at] = own;
    }
    Ok(received)
}
