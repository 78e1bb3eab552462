//! What holds for every communicator: called on all ranks of a world of any size, by the tests of each implementation.

use deepburn_train::parallel::{CommError, Communicator, Hop, Kind, Reduction, Transfer, Values};

/// All of them, in the order that every rank runs them in.
pub(crate) fn all(world: &dyn Communicator) -> Result<(), CommError> {
    sums_are_in_the_order_of_the_ranks(world)?;
    maxima_keep_nan(world)?;
    bytes_come_from_the_root(world)?;
    messages_may_differ_in_length(world)?;
    messages_between_two_ranks_keep_their_order(world)?;
    groups_have_their_own_ranks_and_messages(world)?;
    what_is_sent_is_counted(world)?;
    other_ranks_are_refused(world)?;
    world.barrier()
}

/// Numbers whose sum in single precision depends on the order.
fn number(rank: usize, at: usize) -> f32 {
    [1e8, 1.5, -1e8, 0.37][(rank + at) % 4] * (at as f32 + 1.0)
}

fn sums_are_in_the_order_of_the_ranks(world: &dyn Communicator) -> Result<(), CommError> {
    let (rank, size) = (world.rank(), world.size());
    for length in [0, 1, 3, 1000] {
        let mut singles: Vec<f32> = (0..length).map(|at| number(rank, at)).collect();
        world.all_reduce(Values::F32(&mut singles), Reduction::Sum)?;
        let mut doubles: Vec<f64> = (0..length).map(|at| number(rank, at).into()).collect();
        world.all_reduce(Values::F64(&mut doubles), Reduction::Sum)?;
        let mut counts = vec![1u64 << 40; length];
        world.all_reduce(Values::U64(&mut counts), Reduction::Sum)?;
        for at in 0..length {
            let in_order = (1..size).fold(number(0, at), |sum, rank| sum + number(rank, at));
            assert_eq!(singles[at].to_bits(), in_order.to_bits());
            let first = f64::from(number(0, at));
            let in_order = (1..size).fold(first, |sum, rank| sum + f64::from(number(rank, at)));
            assert_eq!(doubles[at].to_bits(), in_order.to_bits());
            assert_eq!(counts[at], (size as u64) << 40);
        }
    }
    Ok(())
}

fn maxima_keep_nan(world: &dyn Communicator) -> Result<(), CommError> {
    let (rank, last) = (world.rank(), world.size() - 1);
    let nan = if rank == last { f64::NAN } else { 9.0 };
    let mut doubles = [rank as f64, -(rank as f64), nan];
    world.all_reduce(Values::F64(&mut doubles), Reduction::Max)?;
    assert!(doubles[0] == last as f64 && doubles[1] == 0.0 && doubles[2].is_nan());
    let mut counts = [rank as u64, u64::MAX - rank as u64];
    world.all_reduce(Values::U64(&mut counts), Reduction::Max)?;
    assert_eq!(counts, [last as u64, u64::MAX]);
    Ok(())
}

fn bytes_come_from_the_root(world: &dyn Communicator) -> Result<(), CommError> {
    for root in 0..world.size() {
        for length in [0, 1, 5000] {
            let content = vec![root as u8 + 1; length];
            let own = world.rank() == root;
            let mut bytes = if own { content.clone() } else { vec![99; 7] };
            world.broadcast(root, &mut bytes)?;
            assert_eq!(bytes, content);
        }
    }
    Ok(())
}

fn messages_may_differ_in_length(world: &dyn Communicator) -> Result<(), CommError> {
    let (rank, size) = (world.rank(), world.size());
    // Some are empty, one is longer than what MPI sends without asking.
    let message = |from: usize, to: usize| match (from + 2 * to) % 3 {
        0 => Vec::new(),
        1 => vec![(from * size + to) as u8; 3 + from],
        _ => vec![(from + to) as u8; 300_000 + to],
    };
    let to: Vec<Vec<u8>> = (0..size).map(|to| message(rank, to)).collect();
    let found = world.all_to_all_v(&to)?;
    let expected: Vec<Vec<u8>> = (0..size).map(|from| message(from, rank)).collect();
    assert!(found == expected);

    let own = message(rank, rank + 1);
    let expected: Vec<Vec<u8>> = (0..size).map(|from| message(from, from + 1)).collect();
    assert!(world.all_gather(&own)? == expected);
    Ok(())
}

/// A ring in which all send first, in one batch with what they receive, and neighbours have several messages.
fn messages_between_two_ranks_keep_their_order(world: &dyn Communicator) -> Result<(), CommError> {
    let (rank, size) = (world.rank(), world.size());
    let (next, previous) = ((rank + 1) % size, (rank + size - 1) % size);
    // Long and short ones, so that a short one could overtake.
    let content =
        |from: usize, number: usize| vec![(10 * from + number) as u8; 200_000 >> (4 * number)];
    for round in 0..3 {
        let sent: Vec<Vec<u8>> = (0..4).map(|number| content(rank + round, number)).collect();
        let mut received: Vec<Vec<u8>> = sent.iter().map(|sent| vec![0; sent.len()]).collect();
        let mut transfers = Vec::new();
        for bytes in &sent {
            transfers.push(Transfer::Send { to: next, bytes });
        }
        for into in &mut received {
            transfers.push(Transfer::Receive {
                from: previous,
                into,
            });
        }
        world.batch_p2p(&mut transfers)?;
        for (number, received) in received.iter().enumerate() {
            assert!(*received == content(previous + round, number));
        }
    }
    Ok(())
}

fn groups_have_their_own_ranks_and_messages(world: &dyn Communicator) -> Result<(), CommError> {
    let (rank, size) = (world.rank(), world.size());
    // Downwards in two halves.
    let half = world.split(rank as u64 % 2, (size - rank) as u64)?;
    let expected: Vec<usize> = (0..size).rev().filter(|r| r % 2 == rank % 2).collect();
    assert_eq!(half.members(), expected);
    assert_eq!(half.members()[half.rank()], world.members()[rank]);
    assert_eq!(half.node(), world.node());
    let mut sum = [rank as u64];
    half.all_reduce(Values::U64(&mut sum), Reduction::Sum)?;
    assert_eq!(sum[0], expected.iter().sum::<usize>() as u64);

    // Messages of two groups with the same members do not mix.
    let (first, second) = (world.split(0, rank as u64)?, world.split(0, rank as u64)?);
    let (next, previous) = ((rank + 1) % size, (rank + size - 1) % size);
    let round = move |group: Box<dyn Communicator>, content: u8| {
        let mut received = [0];
        let (from, into) = (previous, received.as_mut_slice());
        let (to, bytes) = (next, &[content][..]);
        group.batch_p2p(&mut [
            Transfer::Send { to, bytes },
            Transfer::Receive { from, into },
        ])?;
        Ok(received[0])
    };
    let other = std::thread::spawn(move || round(first, 1));
    assert_eq!(round(second, 2)?, 2);
    assert_eq!(other.join().expect("does not panic")?, 1);

    let alone = half.split(rank as u64, 0)?;
    assert_eq!((alone.size(), alone.rank()), (1, 0));
    alone.barrier()?;
    let mut own = [2.5];
    alone.all_reduce(Values::F64(&mut own), Reduction::Sum)?;
    assert_eq!(own, [2.5]);
    Ok(())
}

fn what_is_sent_is_counted(world: &dyn Communicator) -> Result<(), CommError> {
    let (rank, size) = (world.rank(), world.size());
    let before = world.traffic();
    world.all_to_all_v(&vec![vec![7; 100]; size])?;
    let traffic = world.traffic().since(&before);
    let within = world.nodes().iter().filter(|&&node| node == world.node());
    let within = within.count() - 1;
    let between = size - 1 - within;
    for (hop, ranks) in [(Hop::Within, within), (Hop::Between, between)] {
        assert_eq!(traffic.of(Kind::AllToAll, hop).bytes, 100 * ranks as u64);
        assert_eq!(traffic.of(Kind::AllToAll, hop).messages, ranks as u64);
        assert_eq!(traffic.of(Kind::Sizes, hop).bytes, 8 * ranks as u64);
    }
    // Groups count with their world.
    let before = world.traffic();
    let group = world.split(0, rank as u64)?;
    group.all_gather(&[1; 10])?;
    assert_eq!(group.traffic(), world.traffic());
    let gathered = world.traffic().since(&before);
    let bytes = |hop| gathered.of(Kind::AllGather, hop).bytes;
    let of_split = 16 * (size as u64 - 1);
    assert_eq!(
        bytes(Hop::Within) + bytes(Hop::Between) - of_split,
        10 * (size as u64 - 1)
    );
    Ok(())
}

fn other_ranks_are_refused(world: &dyn Communicator) -> Result<(), CommError> {
    let group = world.split(0, world.rank() as u64)?;
    let size = world.size();
    let error = group.broadcast(size, &mut Vec::new()).unwrap_err();
    assert_eq!(error, CommError::NoSuchRank { rank: size, size });
    Ok(())
}
