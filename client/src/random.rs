//! Chance, where it keeps clients from doing the same thing at the same time.

/// A number in `0.0..1.0`.
pub(crate) fn fraction() -> f64 {
    let mut bytes = [0; 4];
    // A courtesy to others: without randomness it is merely the middle.
    match getrandom::fill(&mut bytes) {
        Ok(()) => f64::from(u32::from_le_bytes(bytes)) / (f64::from(u32::MAX) + 1.0),
        Err(_) => 0.5,
    }
}

/// A place in a list of so many.
pub(crate) fn place(length: usize) -> usize {
    ((fraction() * length as f64) as usize).min(length.saturating_sub(1))
}
