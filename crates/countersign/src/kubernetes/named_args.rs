//! Arguments that know which of them were named on the command line: what was not gives way to what an installation has.

use std::collections::BTreeSet;

use clap::parser::ValueSource;
use clap::{ArgMatches, Args, Command, FromArgMatches};

/// Some arguments, and which were named.
#[derive(Debug, Clone)]
pub struct Named<T> {
    /// All of them, with defaults.
    pub args: T,
    /// The names of the fields that were named.
    pub named: BTreeSet<String>,
}

impl<T: Args> Args for Named<T> {
    fn augment_args(command: Command) -> Command {
        T::augment_args(command)
    }

    fn augment_args_for_update(command: Command) -> Command {
        T::augment_args_for_update(command)
    }
}

impl<T: Args> FromArgMatches for Named<T> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        Self::from_arg_matches_mut(&mut matches.clone())
    }

    fn from_arg_matches_mut(matches: &mut ArgMatches) -> Result<Self, clap::Error> {
        // Before `T` takes the values out.
        let ids: Vec<String> = matches.ids().map(|id| id.as_str().to_owned()).collect();
        let is_named = |id: &String| matches.value_source(id) == Some(ValueSource::CommandLine);
        let named = ids.into_iter().filter(is_named).collect();
        Ok(Self { args: T::from_arg_matches_mut(matches)?, named })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}
