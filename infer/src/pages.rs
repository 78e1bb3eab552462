//! Who holds which page of the latent cache, and which pages are kept for prompts that begin alike.
//!
//! Pages are counted, not copied: a page that several texts have in common is held by each of them. A full page is kept
//! after its text ended, found by all tokens up to its end, until its room is needed.

use std::collections::HashMap;

/// The pages of a cache.
#[derive(Debug)]
pub(crate) struct Pages {
    size: usize,
    free: Vec<u32>,
    pages: Vec<Page>,
    kept: HashMap<Key, u32>,
    /// Counts uses, to know which was the last.
    clock: u64,
}

#[derive(Clone, Debug, Default)]
struct Page {
    /// Running texts that have it.
    holders: u32,
    /// Under what it is kept.
    key: Option<Key>,
    /// Kept pages that follow it.
    followers: u32,
    last_use: u64,
}

/// A kept page: the one before it and its tokens, with those behind it that its latents depend on (prediction modules
/// look ahead).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    before: Option<u32>,
    tokens: Vec<u32>,
}

impl Pages {
    /// `count` free pages of `size` tokens.
    pub(crate) fn new(count: usize, size: usize) -> Self {
        Self {
            size,
            free: (0..count as u32).rev().collect(),
            pages: vec![Page::default(); count],
            kept: HashMap::new(),
            clock: 0,
        }
    }

    /// Tokens per page.
    pub(crate) fn size(&self) -> usize {
        self.size
    }

    /// Pages that are held or kept.
    pub(crate) fn used(&self) -> usize {
        self.pages.len() - self.free.len()
    }

    /// Pages that could be taken: free ones and those that are only kept.
    pub(crate) fn available(&self) -> usize {
        let only_kept = |page: &&Page| page.holders == 0 && page.key.is_some();
        self.free.len() + self.pages.iter().filter(only_kept).count()
    }

    /// A page for one holder. The kept page that was not used for longest makes room; `None` if all are held.
    pub(crate) fn take(&mut self) -> Option<u32> {
        let page = match self.free.pop() {
            Some(page) => page,
            None => self.forget_oldest()?,
        };
        self.pages[page as usize].holders = 1;
        Some(page)
    }

    /// The kept pages that a text begins with, held now. At least its last token is left to compute.
    pub(crate) fn find(&mut self, tokens: &[u32], ahead: usize) -> Vec<u32> {
        let mut found: Vec<u32> = Vec::new();
        loop {
            let (start, end) = (found.len() * self.size, (found.len() + 1) * self.size);
            if end + ahead.max(1) > tokens.len() {
                break;
            }
            let key = Key {
                before: found.last().copied(),
                tokens: tokens[start..end + ahead].to_vec(),
            };
            match self.kept.get(&key) {
                Some(&page) => found.push(page),
                None => break,
            }
        }
        self.clock += 1;
        for &page in &found {
            let page = &mut self.pages[page as usize];
            page.holders += 1;
            page.last_use = self.clock;
        }
        found
    }

    /// Keeps page `index` of a text, all before it being kept. If there is one like it already, that one takes its place.
    pub(crate) fn keep(&mut self, held: &mut [u32], index: usize, tokens: &[u32], ahead: usize) {
        let (start, end) = (index * self.size, (index + 1) * self.size);
        let key = Key {
            before: index.checked_sub(1).map(|before| held[before]),
            tokens: tokens[start..end + ahead].to_vec(),
        };
        self.clock += 1;
        if let Some(&same) = self.kept.get(&key) {
            let page = &mut self.pages[same as usize];
            page.holders += 1;
            page.last_use = self.clock;
            let own = std::mem::replace(&mut held[index], same);
            self.release(&[own]);
            return;
        }
        if let Some(before) = key.before {
            self.pages[before as usize].followers += 1;
        }
        let page = &mut self.pages[held[index] as usize];
        page.key = Some(key.clone());
        page.last_use = self.clock;
        self.kept.insert(key, held[index]);
    }

    /// Gives up a text's hold on its pages.
    pub(crate) fn release(&mut self, held: &[u32]) {
        for &number in held {
            let page = &mut self.pages[number as usize];
            page.holders -= 1;
            if page.holders == 0 && page.key.is_none() {
                self.free.push(number);
            }
        }
    }

    /// Keeps nothing any longer.
    pub(crate) fn forget_all(&mut self) {
        self.kept.clear();
        for (number, page) in (0..).zip(&mut self.pages) {
            page.followers = 0;
            if page.key.take().is_some() && page.holders == 0 {
                self.free.push(number);
            }
        }
    }

    /// Takes the kept page that was not used for longest out of those that nobody holds and nothing follows.
    fn forget_oldest(&mut self) -> Option<u32> {
        let pages = (0..).zip(&self.pages);
        let idle = pages
            .filter(|(_, page)| page.holders == 0 && page.followers == 0 && page.key.is_some());
        let (number, _) = idle.min_by_key(|(_, page)| page.last_use)?;
        let key = self.pages[number as usize].key.take()?;
        if let Some(before) = key.before {
            self.pages[before as usize].followers -= 1;
        }
        self.kept.remove(&key);
        Some(number)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Takes pages for a text, keeps the full ones, and returns them.
    fn written(pages: &mut Pages, tokens: &[u32], ahead: usize) -> Option<Vec<u32>> {
        let mut held = pages.find(tokens, ahead);
        let found = held.len();
        while held.len() * pages.size() < tokens.len() {
            match pages.take() {
                Some(page) => held.push(page),
                None => {
                    pages.release(&held);
                    return None;
                }
            }
        }
        for index in found..tokens.len().saturating_sub(ahead) / pages.size() {
            pages.keep(&mut held, index, tokens, ahead);
        }
        Some(held)
    }

    #[test]
    fn prompts_that_begin_alike_share_full_pages() {
        let mut pages = Pages::new(8, 2);
        let first = written(&mut pages, &[1, 2, 3, 4, 5], 0).unwrap();
        assert_eq!(first.len(), 3);
        // The third page was not full, and the last token is always left.
        assert_eq!(pages.find(&[1, 2, 3, 4, 9, 9], 0), first[..2]);
        assert_eq!(pages.find(&[1, 2, 3, 4], 0), first[..1]);
        assert!(pages.find(&[1, 9, 3, 4, 5], 0).is_empty());
        // The same tokens after another beginning are another page.
        assert!(pages.find(&[3, 4, 3, 4, 5], 0).is_empty());
    }

    #[test]
    fn pages_that_depend_on_what_follows_are_shared_only_where_it_is_the_same() {
        let mut pages = Pages::new(8, 2);
        let first = written(&mut pages, &[1, 2, 3, 4, 5], 1).unwrap();
        assert_eq!(pages.find(&[1, 2, 3, 4, 5, 6], 1), first[..2]);
        assert_eq!(pages.find(&[1, 2, 3, 4, 6, 6], 1), first[..1]);
        assert!(pages.find(&[1, 2, 9, 4, 5, 6], 1).is_empty());
    }

    #[test]
    fn equal_pages_are_held_once() {
        let mut pages = Pages::new(8, 2);
        let tokens = [1, 2, 3, 4, 5];
        let mut texts: Vec<Vec<u32>> = (0..2)
            .map(|_| (0..3).map(|_| pages.take().unwrap()).collect())
            .collect();
        for held in &mut texts {
            for index in 0..2 {
                pages.keep(held, index, &tokens, 0);
            }
        }
        assert_eq!(texts[0][..2], texts[1][..2]);
        assert_ne!(texts[0][2], texts[1][2]);
        assert_eq!(pages.used(), 4);
    }

    #[test]
    fn the_page_unused_for_longest_makes_room_and_never_one_that_is_held_or_followed() {
        let mut pages = Pages::new(4, 1);
        let first = written(&mut pages, &[1, 2], 0).unwrap();
        pages.release(&first);
        let second = written(&mut pages, &[3, 4], 0).unwrap();
        pages.release(&second);
        assert_eq!((pages.used(), pages.available()), (4, 4));
        // [1] is used again, [1, 2] is not.
        let held = pages.find(&[1, 9], 0);
        assert_eq!(held, first[..1]);
        assert_eq!(pages.take(), Some(first[1]));
        assert_eq!(pages.take(), Some(second[1]));
        assert_eq!(pages.take(), Some(second[0]));
        assert_eq!(pages.take(), None);
        assert!(pages.find(&[3, 4, 5], 0).is_empty());
        pages.release(&held);
        assert_eq!(pages.take(), Some(first[0]));
        pages.forget_all();
        assert_eq!(pages.available(), 0);
    }

    proptest! {
        /// Texts come and go at random; no page is ever lost, and none is free and held.
        #[test]
        fn pages_are_neither_lost_nor_given_twice(
            texts in proptest::collection::vec((proptest::collection::vec(0_u32..3, 1..9), any::<bool>()), 1..40),
            ahead in 0_usize..3,
        ) {
            let mut pages = Pages::new(12, 2);
            let mut running: Vec<Vec<u32>> = Vec::new();
            for (tokens, end) in texts {
                if end && !running.is_empty() {
                    let held = running.remove(0);
                    pages.release(&held);
                }
                running.extend(written(&mut pages, &tokens, ahead));
                let holders = |number: u32| running.iter().flatten().filter(|&&p| p == number).count();
                for (number, page) in (0..).zip(&pages.pages) {
                    prop_assert_eq!(page.holders as usize, holders(number));
                    let free = pages.free.contains(&number);
                    prop_assert_eq!(free, page.holders == 0 && page.key.is_none());
                }
                prop_assert_eq!(pages.kept.len(), pages.pages.iter().filter(|p| p.key.is_some()).count());
            }
            running.iter().for_each(|held| pages.release(held));
            prop_assert_eq!(pages.available(), 12);
            prop_assert!((0..12).all(|_| pages.take().is_some()));
        }
    }
}
