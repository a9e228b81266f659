//! The few elements of DER that are written here (X.690).

/// One element: tag, length, value (X.690, 8.1).
pub(crate) fn element(tag: u8, value: &[u8]) -> Vec<u8> {
    let length = value.len().to_be_bytes();
    let digits: Vec<u8> = length.into_iter().skip_while(|b| *b == 0).collect();
    let mut all = Vec::with_capacity(value.len() + 2 + digits.len());
    all.push(tag);
    if value.len() < 0x80 {
        all.push(value.len().to_le_bytes()[0]);
    } else {
        all.push(0x80 | digits.len().to_le_bytes()[0]);
        all.extend(digits);
    }
    all.extend(value);
    all
}

/// A sequence of elements.
pub(crate) fn sequence(value: &[u8]) -> Vec<u8> {
    element(0x30, value)
}

/// A bit string without unused bits.
pub(crate) fn bit_string(value: &[u8]) -> Vec<u8> {
    element(3, &[&[0], value].concat())
}

/// A positive number, whose highest bit is a sign.
pub(crate) fn integer(bytes: &[u8]) -> Vec<u8> {
    let sign: &[u8] = if bytes.first().is_none_or(|first| first & 0x80 != 0) { &[0] } else { &[] };
    element(2, &[sign, bytes].concat())
}
