//! Long lists cut by their bytes: each part fits into a message whatever its items hold.

use prost::Message;

use crate::transport::MAX_MESSAGE_BYTES;

/// Bytes of the items of one message, at most: room is left for what stands beside them.
pub const PORTION_BYTES: usize = MAX_MESSAGE_BYTES / 4;
/// Bytes that a list's item needs beside its own: tag and length.
const FRAME: usize = 8;

/// How many of the first items go into one message: `most` at most, and one at least where there is one.
pub fn first_portion<M: Message>(items: &[M], most: usize) -> usize {
    let mut bytes = 0;
    let fitting = items.iter().take(most).take_while(|item| {
        bytes += item.encoded_len() + FRAME;
        bytes <= PORTION_BYTES
    });
    fitting.count().max(1).min(items.len())
}

/// The items in order, in parts of `most` at most that each fit into a message.
pub fn portions<M: Message>(items: &[M], most: usize) -> impl Iterator<Item = &[M]> {
    let mut left = items;
    std::iter::from_fn(move || {
        let (first, rest) = left.split_at(first_portion(left, most));
        left = rest;
        (!first.is_empty()).then_some(first)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_cut_by_count_and_by_bytes_and_lose_nothing() {
        let sizes = |items: &[String], most| portions(items, most).map(<[String]>::len).collect::<Vec<_>>();
        let small = vec!["x".to_owned(); 5];
        assert_eq!(sizes(&small, 2), [2, 2, 1]);
        assert_eq!(sizes(&[], 2), [] as [usize; 0]);
        let large = vec!["x".repeat(PORTION_BYTES / 3); 5];
        assert_eq!(sizes(&large, 100), [2, 2, 1]);
        assert_eq!(portions(&large, 100).flatten().count(), 5);
        let beyond = vec!["x".repeat(PORTION_BYTES + 1), "y".to_owned()];
        assert_eq!(sizes(&beyond, 100), [1, 1], "one that fits nowhere goes alone, and takes nothing with it");
    }
}
