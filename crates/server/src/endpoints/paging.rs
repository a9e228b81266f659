//! Pages of lists: sorted by name, continued after the last name of the previous page.

/// Largest size of a page.
const MAX_PAGE: usize = 5_000;

/// The page size for a requested `size`; 0 and less mean all at once, as in SPIRE: whoever asks for no pages looks for no token.
pub fn size(size: i32) -> usize {
    usize::try_from(size).ok().filter(|s| *s > 0).map_or(usize::MAX, |size| size.min(MAX_PAGE))
}

/// One page of `all`, which is sorted by `name`, and the token of the next page (empty: none).
pub fn page<T>(all: Vec<T>, size: i32, token: &str, name: impl Fn(&T) -> String) -> (Vec<T>, String) {
    let size = self::size(size);
    let from = if token.is_empty() { 0 } else { all.partition_point(|item| name(item).as_str() <= token) };
    let more = all.len().saturating_sub(from) > size;
    let page: Vec<T> = all.into_iter().skip(from).take(size).collect();
    let next = if more { page.last().map(&name).unwrap_or_default() } else { String::new() };
    (page, next)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_cover_everything_once() {
        let all: Vec<String> = ["a", "b", "c", "d", "e"].map(String::from).to_vec();
        let (mut seen, mut token) = (vec![], String::new());
        loop {
            let (items, next) = page(all.clone(), 2, &token, Clone::clone);
            seen.extend(items);
            if next.is_empty() {
                break;
            }
            token = next;
        }
        assert_eq!(seen, all);
        let many: Vec<String> = (0..10_000).map(|n| format!("{n:05}")).collect();
        let (items, next) = page(many.clone(), 0, "", Clone::clone);
        assert_eq!((items.len(), next.as_str()), (10_000, ""), "no pages were asked for");
        assert_eq!(page(many.clone(), 0, &many[4], Clone::clone).0.len(), 9_995);
        assert_eq!(page(many, i32::MAX, "", Clone::clone).0.len(), MAX_PAGE);
    }
}
