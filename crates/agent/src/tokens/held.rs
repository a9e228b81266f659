//! The tokens at hand: a bounded number, of which those go first that nobody has asked for the longest.

use std::collections::HashMap;
use std::sync::Arc;

use countersign_identity::profile::jwt::Audience;
use countersign_identity::{EntryId, SpiffeId};
use time::OffsetDateTime;
use zeroize::Zeroizing;

/// Most tokens that are kept (SPIRE: 1,000).
pub const MAX_TOKENS: usize = 1_000;
/// Most of them for one entry: a workload chooses its audiences, and must not push out what others use.
pub const MAX_OF_ENTRY: usize = 64;
/// Longest token that is kept, in bytes: with [`MAX_TOKENS`] a bound on the memory that callers can have used for them.
const MAX_KEPT_BYTES: usize = 4 * 1024;

/// What a token was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Asked {
    entry: EntryId,
    /// Sorted, each once: who names the same in another order wants the same.
    audience: Vec<String>,
}

impl Asked {
    /// A token of this entry's identity for these.
    pub fn new(entry: &EntryId, audience: &Audience) -> Self {
        let mut audience = audience.names().to_vec();
        audience.sort();
        audience.dedup();
        Self { entry: entry.clone(), audience }
    }
}

/// A verified token.
pub struct Token {
    /// The token itself: a secret, never logged.
    pub text: Zeroizing<String>,
    /// Whose it is.
    pub id: SpiffeId,
    /// ID of the JWT authority that signed it.
    pub key_id: String,
    /// Revision of the entry that it was signed for.
    pub revision: i64,
    /// When another one is fetched instead.
    pub renew_at: OffsetDateTime,
    /// Its end.
    pub expires_at: OffsetDateTime,
}

/// Tokens by what they were asked for.
pub struct Held {
    /// Each with the turn in which it was used last.
    tokens: HashMap<Asked, (Arc<Token>, u64)>,
    turn: u64,
    most: usize,
    most_of_entry: usize,
}

impl Held {
    /// Holds this many at most, and of them this many of one entry.
    pub fn new(most: usize, most_of_entry: usize) -> Self {
        Self { tokens: HashMap::new(), turn: 0, most, most_of_entry }
    }

    /// The token for this, if one is at hand. It may have ended.
    pub fn get(&mut self, asked: &Asked) -> Option<Arc<Token>> {
        self.turn += 1;
        let (token, used) = self.tokens.get_mut(asked)?;
        *used = self.turn;
        Some(token.clone())
    }

    /// Keeps a token instead of the one before, unless it is very long. When there are too many, those go first that have ended.
    pub fn put(&mut self, asked: Asked, token: Arc<Token>, now: OffsetDateTime) {
        if token.text.len() > MAX_KEPT_BYTES {
            return;
        }
        self.turn += 1;
        let entry = asked.entry.clone();
        self.tokens.insert(asked, (token, self.turn));
        self.make_room(self.most_of_entry, now, |asked| asked.entry == entry);
        self.make_room(self.most, now, |_| true);
    }

    /// Where there are more of these than may be, those go that have ended, and if there are none, the one that was not used for the
    /// longest.
    fn make_room(&mut self, most: usize, now: OffsetDateTime, of: impl Fn(&Asked) -> bool) {
        let is_over = |tokens: &HashMap<Asked, _>| tokens.keys().filter(|asked| of(asked)).count() > most;
        if is_over(&self.tokens) {
            self.tokens.retain(|asked, (token, _)| token.expires_at > now || !of(asked));
        }
        if is_over(&self.tokens) {
            let these = self.tokens.iter().filter(|(asked, _)| of(asked));
            let longest_unused = these.min_by_key(|(_, (_, used))| *used).map(|(asked, _)| asked.clone());
            longest_unused.map(|asked| self.tokens.remove(&asked));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const T0: OffsetDateTime = OffsetDateTime::UNIX_EPOCH;

    fn asked(name: &str) -> Asked {
        Asked::new(&"e".parse().unwrap(), &Audience::new(vec![name.into()]).unwrap())
    }

    fn token(text: &str, seconds: u64) -> Arc<Token> {
        let end = T0 + Duration::from_secs(seconds);
        Arc::new(Token {
            text: Zeroizing::new(text.into()),
            id: crate::testing::id("/e"),
            key_id: "k".into(),
            revision: 1,
            renew_at: end,
            expires_at: end,
        })
    }

    #[test]
    fn there_are_never_more_than_may_be_and_the_longest_unused_goes_first() {
        let mut held = Held::new(3, 9);
        for name in ["a", "b", "c"] {
            held.put(asked(name), token(name, 100), T0);
        }
        assert!(held.get(&asked("a")).is_some());
        held.put(asked("d"), token("d", 100), T0);
        let has = |held: &mut Held, names: [&str; 4]| names.map(|name| held.get(&asked(name)).is_some());
        assert_eq!(has(&mut held, ["a", "b", "c", "d"]), [true, false, true, true]);
        // One that has ended goes before one that was used long ago.
        held.put(asked("c"), token("c", 5), T0);
        held.put(asked("b"), token("b", 100), T0 + Duration::from_secs(6));
        assert_eq!(has(&mut held, ["a", "b", "c", "d"]), [true, true, false, true]);
        for n in 0..1_000 {
            held.put(asked(&n.to_string()), token("x", 100), T0);
            assert!(held.tokens.len() <= 3);
        }
    }

    #[test]
    fn an_entry_that_asks_for_ever_new_audiences_pushes_out_its_own_alone() {
        let mut held = Held::new(10, 3);
        let other = Asked::new(&"other".parse().unwrap(), &Audience::new(vec!["db".into()]).unwrap());
        held.put(other.clone(), token("x", 100), T0);
        for n in 0..100 {
            held.put(asked(&n.to_string()), token("x", 100), T0);
        }
        assert_eq!(held.tokens.len(), 4);
        assert!(held.get(&other).is_some());
        assert!(held.get(&asked("97")).is_some() && held.get(&asked("96")).is_none());
    }

    #[test]
    fn who_names_the_same_audiences_in_another_order_wants_the_same() {
        let of = |names: &[&str]| {
            let names = names.iter().map(|&n| n.to_owned()).collect();
            Asked::new(&"e".parse().unwrap(), &Audience::new(names).unwrap())
        };
        assert_eq!(of(&["a", "b", "a"]), of(&["b", "a"]));
        assert_ne!(of(&["a", "b"]), of(&["ab"]));
    }

    #[test]
    fn a_token_of_unusual_length_is_not_kept() {
        let mut held = Held::new(3, 3);
        held.put(asked("a"), token(&"x".repeat(MAX_KEPT_BYTES + 1), 100), T0);
        assert!(held.get(&asked("a")).is_none());
    }
}
