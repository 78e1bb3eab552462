//! A file of a pipeline schedule, read with care: every problem names its field, and unknown keys are told.
//!
//! The keys are explained in `tests/fixtures/dualpipe/README.md`.

use deepburn_train::pipeline::schedule::{
    Action, Chunk, Costs, Direction, Pass, Schedule, Span, Transfer, TransferKind,
};
use serde_json::{Map, Value};

/// What a file holds.
pub(super) struct ScheduleFile {
    pub(super) schedule: Schedule,
    pub(super) ranks: usize,
    pub(super) micro_batches: usize,
    pub(super) costs: Costs,
    pub(super) makespan: f64,
    pub(super) bubble: Vec<f64>,
    pub(super) order: Vec<Vec<String>>,
    /// By rank.
    pub(super) steps: Vec<RankFile>,
    /// The places of entries that are not known.
    pub(super) unknown: Vec<String>,
}

/// What a file holds of one rank.
pub(super) struct RankFile {
    pub(super) actions: Vec<Action>,
    /// Before each action, and at the end.
    pub(super) waits: Vec<Vec<Transfer>>,
    pub(super) spans: Vec<Span>,
}

impl ScheduleFile {
    /// Reads what was parsed.
    pub(super) fn read(parsed: &Value) -> Result<Self, String> {
        let mut unknown = Vec::new();
        let keys = [
            "schedule",
            "pp",
            "num_chunks",
            "costs",
            "communication",
            "makespan",
            "bubble_per_rank",
            "order",
            "ranks",
        ];
        let top = Object::new(parsed, "", &keys, &mut unknown)?;
        let schedule = match top.get("schedule")?.as_str() {
            Some("DualPipe") => Schedule::DualPipe,
            Some("DualPipeV") => Schedule::DualPipeV,
            _ => return Err(top.expected("schedule", "DualPipe or DualPipeV")),
        };
        let mut costs = costs(top.get("costs")?, &mut unknown)?;
        if top.map.contains_key("communication") {
            costs.communication = top.float("communication")?;
        }
        let mut steps = Vec::new();
        for (rank, (value, place)) in top.list("ranks")?.enumerate() {
            steps.push(RankFile::read(value, &place, rank, &mut unknown)?);
        }
        let names = |(value, place): (&Value, String)| {
            let list = value.as_array().ok_or(wrong(&place, "an array", value))?;
            list.iter()
                .enumerate()
                .map(|(at, name)| {
                    let name = name.as_str().map(str::to_owned);
                    name.ok_or_else(|| wrong(&format!("{place}.{at}"), "a string", &list[at]))
                })
                .collect::<Result<Vec<_>, _>>()
        };
        let file = Self {
            schedule,
            ranks: top.count("pp")?,
            micro_batches: top.count("num_chunks")?,
            costs,
            makespan: top.float("makespan")?,
            bubble: top
                .list("bubble_per_rank")?
                .map(|(value, place)| float(value, &place))
                .collect::<Result<_, _>>()?,
            order: top.list("order")?.map(names).collect::<Result<_, _>>()?,
            steps,
            unknown,
        };
        for (key, count) in [
            ("bubble_per_rank", file.bubble.len()),
            ("order", file.order.len()),
            ("ranks", file.steps.len()),
        ] {
            if count != file.ranks {
                return Err(format!(
                    "{key}: expected pp = {} entries, found {count}",
                    file.ranks
                ));
            }
        }
        Ok(file)
    }
}

impl RankFile {
    fn read(
        value: &Value,
        place: &str,
        rank: usize,
        unknown: &mut Vec<String>,
    ) -> Result<Self, String> {
        let object = Object::new(value, place, &["rank", "ops", "final_wait"], unknown)?;
        if object.count("rank")? != rank {
            return Err(object.expected("rank", &rank.to_string()));
        }
        let mut read = Self {
            actions: Vec::new(),
            waits: Vec::new(),
            spans: Vec::new(),
        };
        for (op, place) in object.list("ops")? {
            let parts: &[&str] = match op.get("op").and_then(Value::as_str) {
                Some("FB") => &["f", "b"],
                _ => &["dir", "mb"],
            };
            let keys = [&["op", "wait", "start", "end"], parts].concat();
            let op = Object::new(op, &place, &keys, unknown)?;
            read.actions.push(action(&op, unknown)?);
            read.waits.push(transfers(&op, "wait", unknown)?);
            read.spans.push(Span {
                start: op.float("start")?,
                end: op.float("end")?,
            });
        }
        read.waits.push(transfers(&object, "final_wait", unknown)?);
        Ok(read)
    }
}

fn costs(value: &Value, unknown: &mut Vec<String>) -> Result<Costs, String> {
    let costs = Object::new(value, "costs", &["F", "B", "Bi", "W", "FB"], unknown)?;
    Ok(Costs {
        forward: costs.float("F")?,
        backward: costs.float("B")?,
        backward_input: costs.float("Bi")?,
        backward_weight: costs.float("W")?,
        overlapped: costs.float("FB")?,
        communication: 0.0,
    })
}

fn action(op: &Object<'_>, unknown: &mut Vec<String>) -> Result<Action, String> {
    let mut part = |key| {
        let part = Object::new(op.get(key)?, &op.place(key), &["dir", "mb"], unknown)?;
        part.chunk()
    };
    Ok(match op.get("op")?.as_str() {
        Some("F") => Action::Forward(op.chunk()?),
        Some("B") => Action::Backward(op.chunk()?),
        Some("Bi") => Action::BackwardInput(op.chunk()?),
        Some("W") => Action::BackwardWeight(op.chunk()?),
        Some("FB") => Action::Overlapped {
            forward: part("f")?,
            backward: part("b")?,
        },
        _ => return Err(op.expected("op", "F, B, Bi, W or FB")),
    })
}

fn transfers(
    object: &Object<'_>,
    key: &str,
    unknown: &mut Vec<String>,
) -> Result<Vec<Transfer>, String> {
    let read = |(value, place): (&Value, String)| {
        let object = Object::new(value, &place, &["c", "dir", "mb", "peer"], unknown)?;
        let (kind, pass) = match object.get("c")?.as_str() {
            Some("sendF") => (TransferKind::Send, Pass::Forward),
            Some("sendB") => (TransferKind::Send, Pass::Backward),
            Some("recvF") => (TransferKind::Receive, Pass::Forward),
            Some("recvB") => (TransferKind::Receive, Pass::Backward),
            _ => return Err(object.expected("c", "sendF, sendB, recvF or recvB")),
        };
        Ok(Transfer {
            kind,
            pass,
            chunk: object.chunk()?,
            peer: object.count("peer")?,
        })
    };
    object.list(key)?.map(read).collect()
}

/// An object and where it is.
struct Object<'a> {
    place: String,
    map: &'a Map<String, Value>,
}

impl<'a> Object<'a> {
    /// Keys other than those that are known are added to `unknown`.
    fn new(
        value: &'a Value,
        place: &str,
        known: &[&str],
        unknown: &mut Vec<String>,
    ) -> Result<Self, String> {
        let Some(map) = value.as_object() else {
            return Err(wrong(place, "an object", value));
        };
        let object = Self {
            place: place.to_owned(),
            map,
        };
        let more = map.keys().filter(|key| !known.contains(&key.as_str()));
        unknown.extend(more.map(|key| object.place(key)));
        Ok(object)
    }

    fn place(&self, key: &str) -> String {
        match self.place.as_str() {
            "" => key.to_owned(),
            place => format!("{place}.{key}"),
        }
    }

    fn get(&self, key: &str) -> Result<&'a Value, String> {
        let value = self.map.get(key);
        value.ok_or_else(|| format!("{}: missing", self.place(key)))
    }

    fn expected(&self, key: &str, what: &str) -> String {
        wrong(&self.place(key), what, &self.map[key])
    }

    fn count(&self, key: &str) -> Result<usize, String> {
        let number = self.get(key)?.as_u64();
        let number = number.and_then(|number| usize::try_from(number).ok());
        number.ok_or_else(|| self.expected(key, "a whole number from 0"))
    }

    fn float(&self, key: &str) -> Result<f64, String> {
        float(self.get(key)?, &self.place(key))
    }

    fn chunk(&self) -> Result<Chunk, String> {
        let direction = Direction::BOTH.get(self.count("dir")?);
        Ok(Chunk {
            direction: *direction.ok_or_else(|| self.expected("dir", "0 or 1"))?,
            micro_batch: self.count("mb")?,
        })
    }

    /// The entries of an array and their places.
    fn list(&self, key: &str) -> Result<impl Iterator<Item = (&'a Value, String)>, String> {
        let list = self.get(key)?.as_array();
        let list = list.ok_or_else(|| self.expected(key, "an array"))?;
        let place = self.place(key);
        let entries = list.iter().enumerate();
        Ok(entries.map(move |(at, value)| (value, format!("{place}.{at}"))))
    }
}

fn float(value: &Value, place: &str) -> Result<f64, String> {
    value
        .as_f64()
        .ok_or_else(|| wrong(place, "a number", value))
}

fn wrong(place: &str, expected: &str, found: &Value) -> String {
    let found = match found {
        Value::Array(_) => "an array".to_owned(),
        Value::Object(_) => "an object".to_owned(),
        scalar => scalar.to_string(),
    };
    let separator = if place.is_empty() { "" } else { ": " };
    format!("{place}{separator}expected {expected}, found {found}")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn whole() -> Value {
        let wait = json!([{ "c": "recvF", "dir": 0, "mb": 0, "peer": 1 }]);
        json!({
            "schedule": "DualPipeV",
            "pp": 1,
            "num_chunks": 2,
            "costs": { "F": 1.0, "B": 2.0, "Bi": 1.0, "W": 1.0, "FB": 3.0 },
            "makespan": 1.0,
            "bubble_per_rank": [0],
            "order": [["F0.0"]],
            "ranks": [{
                "rank": 0,
                "ops": [
                    { "op": "F", "dir": 0, "mb": 0, "wait": wait, "start": 0, "end": 1 },
                    {
                        "op": "FB",
                        "f": { "dir": 1, "mb": 2 },
                        "b": { "dir": 0, "mb": 3 },
                        "wait": [],
                        "start": 1,
                        "end": 4.5,
                    },
                ],
                "final_wait": [],
            }],
        })
    }

    #[test]
    fn what_is_there_is_read_and_what_is_unknown_is_told() {
        let mut value = whole();
        value["note"] = json!(1);
        value["costs"]["X"] = json!(1);
        value["ranks"][0]["ops"][0]["x"] = json!(1);
        value["ranks"][0]["ops"][0]["wait"][0]["y"] = json!(1);
        value["ranks"][0]["ops"][1]["f"]["z"] = json!(1);
        value["communication"] = json!(0.5);
        let file = ScheduleFile::read(&value).unwrap();
        assert_eq!((file.ranks, file.micro_batches), (1, 2));
        assert_eq!(file.costs.communication, 0.5);
        let rank = &file.steps[0];
        let names: Vec<String> = rank.actions.iter().map(ToString::to_string).collect();
        assert_eq!(names, ["F0.0", "F1.2&B0.3"]);
        assert_eq!(rank.waits[0][0].to_string(), "recvF 0.0 from 1");
        assert_eq!(rank.waits[1..], [vec![], vec![]]);
        assert_eq!((rank.spans[1].start, rank.spans[1].end), (1.0, 4.5));
        let mut unknown = file.unknown;
        unknown.sort();
        let expected = [
            "costs.X",
            "note",
            "ranks.0.ops.0.wait.0.y",
            "ranks.0.ops.0.x",
            "ranks.0.ops.1.f.z",
        ];
        assert_eq!(unknown, expected);
    }

    #[test]
    fn problems_name_their_field() {
        for (path, wrong, problem) in [
            ("", json!([]), "expected an object, found an array"),
            (
                "/schedule",
                json!("1F1B"),
                "schedule: expected DualPipe or DualPipeV, found \"1F1B\"",
            ),
            (
                "/pp",
                json!(-1),
                "pp: expected a whole number from 0, found -1",
            ),
            (
                "/pp",
                json!(2),
                "bubble_per_rank: expected pp = 2 entries, found 1",
            ),
            (
                "/costs/Bi",
                json!("1"),
                "costs.Bi: expected a number, found \"1\"",
            ),
            (
                "/order/0/0",
                json!(null),
                "order.0.0: expected a string, found null",
            ),
            (
                "/order/0",
                json!({}),
                "order.0: expected an array, found an object",
            ),
            ("/ranks/0", json!({}), "ranks.0.rank: missing"),
            (
                "/ranks/0/rank",
                json!(3),
                "ranks.0.rank: expected 0, found 3",
            ),
            (
                "/ranks/0/ops/0/op",
                json!("G"),
                "ranks.0.ops.0.op: expected F, B, Bi, W or FB, found \"G\"",
            ),
            (
                "/ranks/0/ops/0/dir",
                json!(2),
                "ranks.0.ops.0.dir: expected 0 or 1, found 2",
            ),
            (
                "/ranks/0/ops/1/b",
                json!(0),
                "ranks.0.ops.1.b: expected an object, found 0",
            ),
            (
                "/ranks/0/ops/1/f/mb",
                json!(0.5),
                "ranks.0.ops.1.f.mb: expected a whole number from 0, found 0.5",
            ),
            (
                "/ranks/0/ops/0/wait/0/c",
                json!("send"),
                "ranks.0.ops.0.wait.0.c: expected sendF, sendB, recvF or recvB, found \"send\"",
            ),
            (
                "/ranks/0/ops/0/end",
                json!(null),
                "ranks.0.ops.0.end: expected a number, found null",
            ),
            (
                "/ranks/0/final_wait",
                json!(null),
                "ranks.0.final_wait: expected an array, found null",
            ),
        ] {
            let mut value = whole();
            *value.pointer_mut(path).unwrap() = wrong;
            assert_eq!(ScheduleFile::read(&value).err().unwrap(), problem);
        }
        for key in whole().as_object().unwrap().keys() {
            let mut value = whole();
            value.as_object_mut().unwrap().remove(key);
            let problem = ScheduleFile::read(&value).err().unwrap();
            assert_eq!(problem, format!("{key}: missing"));
        }
    }
}
