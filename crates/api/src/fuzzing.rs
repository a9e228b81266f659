//! Entry points for the fuzz targets in `fuzz/`, built with `--cfg fuzzing` only.

use crate::unix_authority::Filter;

/// Passes the input through the filter, whole and in pieces; the first byte is the length of the pieces.
///
/// # Panics
/// If a byte is added or lost, or if the pieces make a difference.
pub fn authority_rewrite(data: &[u8]) {
    let Some((piece, data)) = data.split_first() else { return };
    let through = |pieces: &mut dyn Iterator<Item = &[u8]>| {
        let mut filter = Filter::default();
        pieces.for_each(|bytes| filter.push(bytes));
        filter.out().drain(..).collect::<Vec<u8>>()
    };
    let whole = through(&mut std::iter::once(data));
    assert!(whole.len() <= data.len());
    let cut = through(&mut data.chunks(usize::from(*piece).max(1)));
    assert_eq!(whole, cut);
}
