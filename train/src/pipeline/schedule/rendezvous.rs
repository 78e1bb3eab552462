//! Whether what one rank sends is what the other receives, and whether all get to the end.
//!
//! The worst case of point-to-point transfers is assumed: nothing is buffered, so that a send is not done before its
//! receive is started. Between two ranks the first send meets the first receive, and so on. The transfers of a batch
//! are started together.

use std::collections::BTreeMap;

use super::{
    action::{Chunk, Pass, TransferKind},
    timeline::Timeline,
    validate::Violation,
};

/// One side of the transfers from a rank to another: what, and in which batch of the rank on that side.
type Side = Vec<((Pass, Chunk), usize)>;

/// Needs as many ranks as the placement has, and their transfers to be between neighbours.
pub(super) fn check(timeline: &Timeline) -> Result<(), Violation> {
    let mut partners: Vec<Vec<Vec<(usize, usize)>>> = timeline
        .ranks
        .iter()
        .map(|rank| rank.waits().map(|_| Vec::new()).collect())
        .collect();
    for ((from, to), [sent, received]) in lanes(timeline) {
        for place in 0..sent.len().max(received.len()) {
            let (send, receive) = (sent.get(place), received.get(place));
            match (send, receive) {
                (Some((a, first)), Some((b, second))) if a == b => {
                    partners[from][*first].push((to, *second));
                    partners[to][*second].push((from, *first));
                }
                _ => {
                    return Err(Violation::Mismatch {
                        from,
                        to,
                        place,
                        sent: send.map(|(what, _)| *what),
                        received: receive.map(|(what, _)| *what),
                    });
                }
            }
        }
    }
    everybody_gets_to_the_end(&partners)
}

/// By (sender, receiver): what the one sends and what the other receives.
fn lanes(timeline: &Timeline) -> BTreeMap<(usize, usize), [Side; 2]> {
    let mut lanes: BTreeMap<_, [Side; 2]> = BTreeMap::new();
    for (rank, steps) in timeline.ranks.iter().enumerate() {
        for (batch, wait) in steps.waits().enumerate() {
            for transfer in wait {
                let ends = match transfer.kind {
                    TransferKind::Send => (rank, transfer.peer),
                    TransferKind::Receive => (transfer.peer, rank),
                };
                let lane = lanes.entry(ends).or_default();
                let what = (transfer.pass, transfer.chunk);
                lane[transfer.kind as usize].push((what, batch));
            }
        }
    }
    lanes
}

/// Goes through the batches of all ranks, given the ranks and batches that each has to meet.
fn everybody_gets_to_the_end(partners: &[Vec<Vec<(usize, usize)>>]) -> Result<(), Violation> {
    let mut at = vec![0; partners.len()];
    let mut moved = true;
    while moved {
        moved = false;
        for (rank, batches) in partners.iter().enumerate() {
            while let Some(batch) = batches.get(at[rank])
                && batch.iter().all(|&(peer, other)| at[peer] >= other)
            {
                at[rank] += 1;
                moved = true;
            }
        }
    }
    // Who has not got to the end waits for somebody who has not got there either.
    let waits_for = |rank: usize| -> Option<usize> {
        let batch = partners[rank].get(at[rank])?;
        let mut peers = batch.iter().filter(|&&(peer, other)| at[peer] < other);
        peers.next().map(|(peer, _)| *peer)
    };
    let Some(mut rank) = (0..partners.len()).find(|&rank| waits_for(rank).is_some()) else {
        return Ok(());
    };
    let mut path = Vec::new();
    while !path.contains(&(rank, at[rank])) {
        path.push((rank, at[rank]));
        rank = waits_for(rank).expect("a rank that another waits for waits itself");
    }
    let circle = path.into_iter().skip_while(|(first, _)| *first != rank);
    Err(Violation::Deadlock {
        waiting: circle.collect(),
    })
}
