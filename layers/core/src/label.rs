//! Names that people give, as they are told in logs and as labels of metrics.

/// Whether a name is fit to be a label: not empty, at most so many characters,
/// and all of them printable ASCII.
///
/// ```
/// use buttress_core::label;
///
/// assert!(label::is_sound("orders@127.0.0.1:9001", 64));
/// assert!(!label::is_sound("", 64));
/// assert!(!label::is_sound("a\nb", 64));
/// ```
#[must_use]
pub fn is_sound(name: &str, longest: usize) -> bool {
    let is_printable = |byte: u8| matches!(byte, b' '..=b'~');
    !name.is_empty() && name.len() <= longest && name.bytes().all(is_printable)
}
