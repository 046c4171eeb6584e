//! Where the ledgers are: in memory that is never given back, but used again.
//!
//! A permit that held a reference count would cost a request two more atomic
//! operations than the two that count it, all threads on the same word. So it
//! holds a plain reference, to what lives as long as the process: there are as
//! many ledgers as there ever were shutdowns at the same time, one most often.
//! When the last handle of a shutdown is gone its ledger is abandoned, and
//! whoever then counts the last request out, or finds none left, puts it back.

use std::sync::{Mutex, PoisonError};

use tokio::sync::Notify;

use crate::ledger::{Kind, Ledger, Left};

/// A ledger, and who waits for it to be empty.
pub(crate) struct Books {
    pub(crate) ledger: Ledger,
    /// The last of a kind has gone.
    pub(crate) emptied: Notify,
}

static FREE: Mutex<Vec<&'static Books>> = Mutex::new(Vec::new());

impl Books {
    /// Some that nobody else has: nobody is counted, and nothing is asked for.
    pub(crate) fn open() -> &'static Self {
        let free = FREE.lock().unwrap_or_else(PoisonError::into_inner).pop();
        free.unwrap_or_else(|| {
            Box::leak(Box::new(Self {
                ledger: Ledger::new(),
                emptied: Notify::new(),
            }))
        })
    }

    #[inline]
    pub(crate) fn leave(&'static self, kind: Kind) {
        match self.ledger.leave(kind) {
            Left::Others => {}
            Left::Emptied => self.emptied.notify_waiters(),
            Left::Free => self.put_back(),
        }
    }

    /// Nobody comes any more; those who are there may still go.
    pub(crate) fn abandon(&'static self) {
        if self.ledger.abandon() {
            self.put_back();
        }
    }

    #[cold]
    fn put_back(&'static self) {
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        free.push(self);
    }
}

#[cfg(all(test, not(buttress_loom)))]
mod tests {
    use super::*;
    use crate::Phase;

    /// Others take and put back meanwhile, so that it is looked for.
    fn is_free(books: &'static Books) -> bool {
        let free = FREE.lock().unwrap();
        free.iter().any(|other| std::ptr::eq(*other, books))
    }

    #[test]
    fn the_last_puts_them_back() {
        let books = Books::open();
        books.ledger.enter(Kind::Request);
        books.ledger.advance(Phase::Draining);
        books.abandon();
        assert!(!is_free(books));
        // From here on it is anybody's.
        books.leave(Kind::Request);

        let books = Books::open();
        books.ledger.enter(Kind::Request);
        books.leave(Kind::Request);
        assert!(!is_free(books));
        books.abandon();
    }

    #[test]
    fn they_are_used_again_and_never_by_two() {
        let mut seen = Vec::new();
        for _ in 0..1000 {
            let books = [Books::open(), Books::open()];
            assert!(!std::ptr::eq(books[0], books[1]));
            for books in books {
                assert!(books.ledger.is_idle());
                assert_eq!(books.ledger.phase(), Phase::Serving);
                books.ledger.enter(Kind::Request);
                books.ledger.advance(Phase::Done);
                seen.push(std::ptr::from_ref(books));
                books.abandon();
                books.leave(Kind::Request);
            }
        }
        seen.sort_unstable();
        seen.dedup();
        assert!(seen.len() < 100, "{}", seen.len());
    }
}
