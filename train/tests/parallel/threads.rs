//! Ranks as threads: what holds for every communicator, and how failures end.

use std::{
    sync::Barrier,
    thread,
    time::{Duration, Instant},
};

use crate::suite;
use deepburn_train::parallel::{
    CommError, Communicator, Kind, LocalOptions, Reduction, Transfer, Values, local::run,
};

fn impatient() -> LocalOptions {
    LocalOptions {
        deadline: Duration::from_millis(300),
        ..LocalOptions::default()
    }
}

fn receive(world: &dyn Communicator, from: usize, length: usize) -> Result<Vec<u8>, CommError> {
    let mut bytes = vec![0; length];
    let into = bytes.as_mut_slice();
    world.batch_p2p(&mut [Transfer::Receive { from, into }])?;
    Ok(bytes)
}

fn send(world: &dyn Communicator, to: usize, bytes: &[u8]) -> Result<(), CommError> {
    world.batch_p2p(&mut [Transfer::Send { to, bytes }])
}

#[test]
fn threads_are_ranks() {
    for nodes in [
        &[0][..],
        &[0, 0],
        &[5, 5, 2],
        &[0, 0, 1, 1],
        &[0, 1, 0, 1, 2, 2, 2],
    ] {
        for result in run(nodes, LocalOptions::default(), |world| suite::all(&world)) {
            result.unwrap();
        }
    }
}

/// Both send before they receive: nothing buffers, so this hangs, and the error says who waits for what.
#[test]
fn a_hang_is_described() {
    // On a busy machine a thread may begin later than the others' patience lasts.
    let both = Barrier::new(2);
    let errors = run(&[0, 0, 0], impatient(), |world| match world.rank() {
        2 => Ok(Vec::new()),
        rank => {
            both.wait();
            send(&world, 1 - rank, &[1])?;
            receive(&world, 1 - rank, 1)
        }
    });
    assert!(errors[2].is_ok());
    let error = errors[0].clone().unwrap_err();
    assert_eq!(
        error.to_string(),
        "no progress for 300ms: rank 0 waits in PointToPoint to send to [1]; \
         rank 1 waits in PointToPoint to send to [0]"
    );
    assert!(errors[1].is_err());
}

/// Slow ranks are not a hang as long as anything moves.
#[test]
fn progress_anywhere_moves_the_deadline() {
    let results = run(&[0, 0, 0], impatient(), |world| {
        if world.rank() == 2 {
            return receive(&world, 0, 1).map(|_| ());
        }
        for _ in 0..6 {
            thread::sleep(Duration::from_millis(100));
            match world.rank() {
                0 => send(&world, 1, &[1])?,
                _ => receive(&world, 0, 1).map(|_| ())?,
            }
        }
        if world.rank() == 0 {
            send(&world, 2, &[1])?;
        }
        Ok(())
    });
    assert_eq!(results, [Ok(()), Ok(()), Ok(())]);
}

#[test]
fn a_rank_that_ends_is_named() {
    let started = Instant::now();
    let errors = run(&[0, 0, 0], LocalOptions::default(), |world| {
        if world.rank() == 1 {
            return Ok(());
        }
        let mut values = [1.0];
        world.all_reduce(Values::F32(&mut values), Reduction::Sum)
    });
    assert!(
        started.elapsed() < Duration::from_secs(60),
        "waited for the deadline"
    );
    let texts: Vec<String> = [&errors[0], &errors[2]]
        .map(|error| error.clone().unwrap_err().to_string())
        .into();
    for text in &texts {
        assert!(text.contains("rank 1 is gone"), "{text}");
    }
    let gone =
        |error: &Result<(), CommError>| matches!(error, Err(CommError::Gone { rank: 1, .. }));
    assert!(gone(&errors[0]) || gone(&errors[2]));
}

#[test]
fn an_abort_ends_all_ranks_in_all_groups() {
    let started = Instant::now();
    let errors = run(&[0, 0, 1, 1], LocalOptions::default(), |world| {
        let pair = world.split(world.rank() as u64 / 2, 0)?;
        if world.rank() == 3 {
            pair.abort("the disk is full");
            return Ok(());
        }
        // Rank 2 waits for rank 3; ranks 0 and 1 for ever, for each other.
        loop {
            pair.barrier()?;
        }
    });
    assert!(
        started.elapsed() < Duration::from_secs(60),
        "waited for the deadline"
    );
    for error in &errors[..3] {
        let aborted = CommError::Aborted {
            rank: 3,
            reason: "the disk is full".into(),
        };
        assert_eq!(error, &Err(aborted));
    }
}

#[test]
fn a_message_of_another_length_is_an_error_on_both_sides() {
    let errors = run(&[0, 0], LocalOptions::default(), |world| {
        if world.rank() == 0 {
            send(&world, 1, &[1, 2, 3]).map(|()| Vec::new())
        } else {
            receive(&world, 0, 4)
        }
    });
    let Err(CommError::Length {
        rank,
        found,
        expected,
        wait,
    }) = &errors[1]
    else {
        panic!("{:?}", errors[1]);
    };
    assert_eq!(
        (*rank, *found, *expected, wait.kind),
        (0, 3, 4, Kind::PointToPoint)
    );
    let text = errors[0].clone().unwrap_err().to_string();
    assert!(
        text.starts_with("rank 1 gave up: rank 0 sent 3 bytes where rank 1 waits"),
        "{text}"
    );
}
