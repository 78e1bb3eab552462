//! A conversation with its settings, and the file it can be kept in.

use std::{fmt::Display, fs, path::Path, str::FromStr};

use anyhow::{Context, anyhow, bail};
use deepburn_infer::{
    chat_template::{Message, Role},
    engine::GenerateOptions,
};
use deepburn_model::checkpoint;

/// What was said, and how answers are chosen.
pub(super) struct Session {
    pub(super) system: Option<String>,
    /// Without the system message.
    pub(super) messages: Vec<Message>,
    pub(super) options: GenerateOptions,
    /// Answers since the conversation began.
    answers: u64,
}

impl Session {
    pub(super) fn new(system: Option<String>) -> Self {
        Self {
            system,
            messages: Vec::new(),
            options: GenerateOptions::default(),
            answers: 0,
        }
    }

    /// Forgets what was said.
    pub(super) fn reset(&mut self) {
        self.messages.clear();
        self.answers = 0;
    }

    /// All messages, the system message first.
    pub(super) fn all(&self) -> Vec<Message> {
        let system = self.system.iter();
        let system = system.map(|text| Message::new(Role::System, text));
        system.chain(self.messages.iter().cloned()).collect()
    }

    /// How the next answer is chosen: the same seed would repeat itself within a conversation.
    pub(super) fn next_options(&mut self) -> GenerateOptions {
        let mut options = self.options.clone();
        options.sampler.seed = options.sampler.seed.wrapping_add(self.answers);
        self.answers += 1;
        options
    }

    /// Changes a setting, unless its value is not allowed.
    pub(super) fn set(&mut self, name: &str, value: &str) -> anyhow::Result<()> {
        let mut options = self.options.clone();
        let sampler = &mut options.sampler;
        match name {
            "temperature" => sampler.temperature = number(value)?,
            "top_k" => sampler.top_k = number_or_none(value)?,
            "top_p" => sampler.top_p = number_or_none(value)?,
            "min_p" => sampler.min_p = number_or_none(value)?,
            "seed" => sampler.seed = number(value)?,
            "repetition_penalty" => options.penalties.repetition = number(value)?,
            "max_new_tokens" => options.max_new_tokens = number(value)?,
            _ => bail!(
                "{name:?} is no setting: there are temperature, top_p, top_k, min_p, repetition_penalty, \
                 max_new_tokens and seed"
            ),
        }
        options.validate()?;
        self.options = options;
        Ok(())
    }

    /// The settings, one a line.
    pub(super) fn settings(&self) -> String {
        fn or_dash(value: Option<impl Display>) -> String {
            value.map_or_else(|| "-".to_owned(), |value| value.to_string())
        }
        let sampler = &self.options.sampler;
        format!(
            "temperature        {}\ntop_p              {}\ntop_k              {}\nmin_p              {}\n\
             repetition_penalty {}\nmax_new_tokens     {}\nseed               {}\n",
            sampler.temperature,
            or_dash(sampler.top_p),
            or_dash(sampler.top_k),
            or_dash(sampler.min_p),
            self.options.penalties.repetition,
            self.options.max_new_tokens,
            sampler.seed,
        )
    }

    /// Writes the messages as OpenAI's interface takes them.
    pub(super) fn save(&self, path: &Path) -> anyhow::Result<()> {
        let text = serde_json::to_string_pretty(&self.all())? + "\n";
        checkpoint::write_file(path, text.as_bytes())?;
        Ok(())
    }

    /// Goes on with what [`Session::save`] has written.
    pub(super) fn load(&mut self, path: &Path) -> anyhow::Result<()> {
        let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let messages: Vec<Message> = serde_json::from_str(&text)
            .with_context(|| format!("{}: is no saved conversation", path.display()))?;
        let mut messages = messages.into_iter().peekable();
        let system = messages.next_if(|message| message.role == Role::System);
        self.system = system.map(|message| message.content);
        self.messages = messages.collect();
        self.answers = 0;
        Ok(())
    }
}

fn number<T: FromStr<Err: Display>>(value: &str) -> anyhow::Result<T> {
    value.parse().map_err(|error| anyhow!("{value:?}: {error}"))
}

fn number_or_none<T: FromStr<Err: Display>>(value: &str) -> anyhow::Result<Option<T>> {
    match value {
        "-" => Ok(None),
        _ => number(value).map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_change_only_to_what_is_allowed() {
        let mut session = Session::new(None);
        session.set("temperature", "0.5").unwrap();
        session.set("top_p", "0.9").unwrap();
        session.set("max_new_tokens", "7").unwrap();
        let expected = "temperature        0.5\ntop_p              0.9\ntop_k              -\nmin_p              -\n\
                        repetition_penalty 1\nmax_new_tokens     7\nseed               0\n";
        assert_eq!(session.settings(), expected);
        for (name, value, part) in [
            ("temperature", "-1", "temperature"),
            ("temperature", "hot", "\"hot\": invalid float"),
            ("temperature", "-", "\"-\": invalid float"),
            ("top_k", "0", "top_k"),
            ("volume", "11", "\"volume\" is no setting"),
        ] {
            let message = session.set(name, value).unwrap_err().to_string();
            assert!(message.contains(part), "{name} {value}: {message}");
        }
        assert_eq!(session.settings(), expected);
        session.set("top_p", "-").unwrap();
        assert_eq!(session.options.sampler.top_p, None);
        let seeds = [0, 1].map(|_| session.next_options().sampler.seed);
        assert_eq!(seeds, [0, 1]);
        session.reset();
        assert_eq!(session.next_options().sampler.seed, 0);
    }

    #[test]
    fn conversations_come_back_from_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("talk.json");
        let mut session = Session::new(Some("Be brief.".to_owned()));
        session.messages = vec![
            Message::new(Role::User, "a \"b\"\n"),
            Message::new(Role::Assistant, "c"),
        ];
        session.save(&path).unwrap();
        let mut loaded = Session::new(None);
        loaded.load(&path).unwrap();
        assert_eq!(loaded.all(), session.all());
        assert_eq!(loaded.system.as_deref(), Some("Be brief."));

        fs::write(&path, "[{\"role\": \"robot\", \"content\": \"\"}]").unwrap();
        let message = crate::with_causes(&loaded.load(&path).unwrap_err());
        assert!(message.contains("talk.json: is no saved"), "{message}");
        assert!(message.contains("robot"), "{message}");
        assert!(loaded.load(&dir.path().join("gone")).is_err());
        assert_eq!(loaded.all(), session.all());
    }
}
