//! What a line means: something to say, or a command.

use std::path::PathBuf;

/// A line that was understood.
#[derive(Debug, PartialEq)]
pub(super) enum Line {
    /// An empty one.
    Nothing,
    /// A message.
    Said(String),
    /// An order to the program.
    Command(Command),
}

/// An order to the program.
#[derive(Debug, PartialEq)]
pub(super) enum Command {
    Help,
    Reset,
    System(Option<String>),
    Save(PathBuf),
    Load(PathBuf),
    Settings,
    Set { name: String, value: String },
    Quit,
}

impl Line {
    /// Reads a line; the error says what is wrong with a command.
    pub(super) fn parse(line: &str) -> Result<Self, String> {
        if line.trim().is_empty() {
            return Ok(Self::Nothing);
        }
        let Some(command) = line.strip_prefix('/') else {
            return Ok(Self::Said(line.to_owned()));
        };
        if command.starts_with('/') {
            return Ok(Self::Said(command.to_owned()));
        }
        let (name, rest) = match command.split_once(char::is_whitespace) {
            Some((name, rest)) => (name, rest.trim()),
            None => (command, ""),
        };
        let alone = |command| match rest {
            "" => Ok(command),
            _ => Err(format!("/{name} stands alone; found {rest:?} after it")),
        };
        let file = || match rest {
            "" => Err(format!("/{name} needs a file: /{name} FILE")),
            _ => Ok(PathBuf::from(rest)),
        };
        let command = match name {
            "help" => alone(Command::Help)?,
            "reset" => alone(Command::Reset)?,
            "quit" | "exit" => alone(Command::Quit)?,
            "system" => Command::System((!rest.is_empty()).then(|| rest.to_owned())),
            "save" => Command::Save(file()?),
            "load" => Command::Load(file()?),
            "set" => match rest.split_once(char::is_whitespace) {
                Some((name, value)) => Command::Set {
                    name: name.to_owned(),
                    value: value.trim().to_owned(),
                },
                None if rest.is_empty() => Command::Settings,
                None => return Err(format!("/set needs a value: /set {rest} VALUE")),
            },
            _ => return Err(format!("/{name} is no command; /help lists them")),
        };
        Ok(Self::Command(command))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_messages_or_commands() {
        let command = |line: &str| match Line::parse(line) {
            Ok(Line::Command(command)) => command,
            other => panic!("{line}: {other:?}"),
        };
        let set = |name: &str, value: &str| Command::Set {
            name: name.to_owned(),
            value: value.to_owned(),
        };
        assert_eq!(Line::parse("  \t"), Ok(Line::Nothing));
        assert_eq!(Line::parse(" a / b"), Ok(Line::Said(" a / b".to_owned())));
        assert_eq!(Line::parse("//help"), Ok(Line::Said("/help".to_owned())));
        assert_eq!(command("/help"), Command::Help);
        assert_eq!(command("/reset "), Command::Reset);
        assert_eq!(command("/quit"), Command::Quit);
        assert_eq!(command("/system"), Command::System(None));
        let text = Some("Be  brief.".to_owned());
        assert_eq!(command("/system  Be  brief. "), Command::System(text));
        assert_eq!(command("/save a b.json"), Command::Save("a b.json".into()));
        assert_eq!(command("/load x"), Command::Load("x".into()));
        assert_eq!(command("/set"), Command::Settings);
        assert_eq!(command("/set temperature  0.7"), set("temperature", "0.7"));
        for (line, message) in [
            ("/quit now", "/quit stands alone; found \"now\" after it"),
            ("/save", "/save needs a file: /save FILE"),
            ("/set seed", "/set needs a value: /set seed VALUE"),
            ("/exti", "/exti is no command; /help lists them"),
        ] {
            assert_eq!(Line::parse(line), Err(message.to_owned()));
        }
    }
}
