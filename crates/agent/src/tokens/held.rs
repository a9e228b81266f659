//! The tokens at hand: a bounded number. When there are too many, one of the caller's goes who has the most, for callers choose their
//! audiences: the one that nobody has asked for the longest.

use std::collections::HashMap;
use std::sync::Arc;

use countersign_identity::profile::jwt::Audience;
use countersign_identity::{EntryId, SpiffeId};
use time::OffsetDateTime;
use zeroize::Zeroizing;

use crate::endpoints::Follower as Caller;

/// Most tokens that are kept (SPIRE: 1,000).
pub const MAX_TOKENS: usize = 1_000;
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
    tokens: HashMap<Asked, Kept>,
    turn: u64,
    most: usize,
}

struct Kept {
    token: Arc<Token>,
    /// Who had it fetched.
    caller: Caller,
    /// The turn in which it was used last.
    used: u64,
}

impl Held {
    /// Holds this many at most.
    pub fn new(most: usize) -> Self {
        Self { tokens: HashMap::new(), turn: 0, most }
    }

    /// The token for this, if one is at hand. It may have ended.
    pub fn get(&mut self, asked: &Asked) -> Option<Arc<Token>> {
        self.turn += 1;
        let kept = self.tokens.get_mut(asked)?;
        kept.used = self.turn;
        Some(kept.token.clone())
    }

    /// Keeps a token instead of the one before, unless it is very long. When there are too many, those go first that have ended.
    pub fn put(&mut self, asked: Asked, token: Arc<Token>, caller: &Caller, now: OffsetDateTime) {
        if token.text.len() > MAX_KEPT_BYTES {
            return;
        }
        self.turn += 1;
        self.tokens.insert(asked, Kept { token, caller: caller.clone(), used: self.turn });
        if self.tokens.len() > self.most {
            self.tokens.retain(|_, kept| kept.token.expires_at > now);
        }
        if self.tokens.len() > self.most {
            let greatest = self.greatest();
            let its = self.tokens.iter().filter(|(_, kept)| Some(&kept.caller) == greatest.as_ref());
            let longest_unused = its.min_by_key(|(_, kept)| kept.used).map(|(asked, _)| asked.clone());
            longest_unused.map(|asked| self.tokens.remove(&asked));
        }
    }

    /// The caller who has the most.
    fn greatest(&self) -> Option<Caller> {
        let mut each: HashMap<&Caller, usize> = HashMap::new();
        for kept in self.tokens.values() {
            *each.entry(&kept.caller).or_default() += 1;
        }
        each.into_iter().max_by_key(|(_, count)| *count).map(|(caller, _)| caller.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const CALLER: Caller = Caller::User(1);
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
        let mut held = Held::new(3);
        for name in ["a", "b", "c"] {
            held.put(asked(name), token(name, 100), &CALLER, T0);
        }
        assert!(held.get(&asked("a")).is_some());
        held.put(asked("d"), token("d", 100), &CALLER, T0);
        let has = |held: &mut Held, names: [&str; 4]| names.map(|name| held.get(&asked(name)).is_some());
        assert_eq!(has(&mut held, ["a", "b", "c", "d"]), [true, false, true, true]);
        // One that has ended goes before one that was used long ago.
        held.put(asked("c"), token("c", 5), &CALLER, T0);
        held.put(asked("b"), token("b", 100), &CALLER, T0 + Duration::from_secs(6));
        assert_eq!(has(&mut held, ["a", "b", "c", "d"]), [true, true, false, true]);
        for n in 0..1_000 {
            held.put(asked(&n.to_string()), token("x", 100), &CALLER, T0);
            assert!(held.tokens.len() <= 3);
        }
    }

    #[test]
    fn who_asks_for_ever_new_audiences_pushes_out_his_own_alone_with_however_many_identities() {
        let mut held = Held::new(10);
        let other = Asked::new(&"e".parse().unwrap(), &Audience::new(vec!["db".into()]).unwrap());
        held.put(other.clone(), token("x", 100), &Caller::User(2), T0);
        for n in 0..100 {
            let entry = format!("e{}", n % 20).parse().unwrap();
            let asked = Asked::new(&entry, &Audience::new(vec![n.to_string()]).unwrap());
            held.put(asked, token("x", 100), &CALLER, T0);
        }
        assert_eq!(held.tokens.len(), 10);
        assert!(held.get(&other).is_some());
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
        let mut held = Held::new(3);
        held.put(asked("a"), token(&"x".repeat(MAX_KEPT_BYTES + 1), 100), &CALLER, T0);
        assert!(held.get(&asked("a")).is_none());
    }
}
