//! HPACK's Huffman code (RFC 7541 B) for the symbols of paths. The code is canonical: lengths determine codes.

/// Symbols by the length of their code in bits, each group in order. NUL is included to keep the count right.
const GROUPS: [(u32, &[u8]); 10] = [
    (5, b"012aceiost"),
    (6, b" %-./3456789=A_bdfghlmnpru"),
    (7, b":BCDEFGHIJKLMNOPQRSTUVWYjkqvwxyz"),
    (8, b"&*,;XZ"),
    (10, b"!\"()?"),
    (11, b"'+|"),
    (12, b"#>"),
    (13, b"\0$@[]~"),
    (14, b"^}"),
    (15, b"<`{"),
];

/// The code of a symbol and its length in bits; `None` if the table lacks the symbol.
fn code_of(symbol: u8) -> Option<(u32, u32)> {
    let mut first = 0;
    let mut before = GROUPS[0].0;
    for (length, symbols) in GROUPS {
        first <<= length - before;
        if let Some(position) = symbols.iter().position(|s| *s == symbol) {
            return Some((first + u32::try_from(position).ok()?, length));
        }
        first += u32::try_from(symbols.len()).ok()?;
        before = length;
    }
    None
}

/// The symbol whose code starts at a bit, and the code's length in bits.
fn symbol_at(coded: &[u8], bit: usize) -> Option<(u8, usize)> {
    let mut first = 0u32;
    let mut before = GROUPS[0].0;
    for (length, symbols) in GROUPS {
        first <<= length - before;
        let count = u32::try_from(symbols.len()).ok()?;
        let code = bits(coded, bit, length)?;
        if code < first + count {
            return Some((
                *symbols.get(usize::try_from(code.checked_sub(first)?).ok()?)?,
                usize::try_from(length).ok()?,
            ));
        }
        first += count;
        before = length;
    }
    None
}

fn bits(coded: &[u8], at: usize, count: u32) -> Option<u32> {
    (0..usize::try_from(count).ok()?).try_fold(0, |value, n| {
        let byte = *coded.get((at + n) / 8)?;
        Some(value << 1 | u32::from(byte >> (7 - (at + n) % 8) & 1))
    })
}

/// Replaces each foreign symbol by `-`, if its code has the same length.
pub fn replace(coded: &mut [u8], is_foreign: fn(u8) -> bool) {
    let Some((hyphen, length)) = code_of(b'-') else { return };
    let mut at = 0;
    while let Some((symbol, width)) = symbol_at(coded, at) {
        if is_foreign(symbol) && u32::try_from(width) == Ok(length) {
            for n in 0..width {
                let (byte, shift) = ((at + n) / 8, 7 - (at + n) % 8);
                let bit = u8::from(hyphen >> (width - 1 - n) & 1 == 1);
                coded[byte] = coded[byte] & !(1 << shift) | bit << shift;
            }
        }
        at += width;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub fn encode(text: &str) -> Vec<u8> {
    let mut all: Vec<bool> = vec![];
    for symbol in text.bytes() {
        let (code, length) = code_of(symbol).unwrap();
        all.extend((0..length).rev().map(|n| code >> n & 1 == 1));
    }
    // Padded with the beginning of the end-of-string code, which is all ones.
    all.resize(all.len().next_multiple_of(8), true);
    all.chunks(8).map(|c| c.iter().fold(0, |b, bit| b << 1 | u8::from(*bit))).collect()
}

/// The text of a code from [`encode`].
#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub fn decode(coded: &[u8]) -> String {
    let (mut text, mut at) = (vec![], 0);
    while let Some((symbol, width)) = symbol_at(coded, at) {
        text.push(symbol);
        at += width;
    }
    assert!(8 * coded.len() - at < 8, "only padding may be left");
    String::from_utf8(text).unwrap()
}
