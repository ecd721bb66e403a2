//! What is made of stored objects, and made again when they have changed.

use crate::store::Store;
use arc_swap::ArcSwap;
use std::sync::{Arc, Mutex, PoisonError};

/// Something that is made of all objects of some resources.
///
/// It is never older than what its reader has seen of them: who finds an object gone, or there, finds
/// what follows from it too, whoever wrote it.
pub struct Derived<T> {
    of: &'static [&'static str],
    made: ArcSwap<Made<T>>,
    making: Mutex<()>,
}

struct Made<T> {
    /// The last changes that are in it; none: of nothing yet.
    of: Vec<u64>,
    value: Arc<T>,
}

impl<T: Default> Derived<T> {
    /// Of these resources; not made yet.
    pub fn new(of: &'static [&'static str]) -> Self {
        let made = Made { of: Vec::new(), value: Arc::default() };
        Self { of, made: ArcSwap::from_pointee(made), making: Mutex::new(()) }
    }

    /// As it is now. `make` reads the store.
    pub fn load(&self, store: &Store, make: impl FnOnce() -> T) -> Arc<T> {
        let changed = || self.of.iter().map(|resource| store.changed(resource));
        let fresh = || {
            let made = self.made.load();
            made.of.iter().copied().eq(changed()).then(|| made.value.clone())
        };
        if let Some(value) = fresh() {
            return value;
        }
        let _making = self.making.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(value) = fresh() {
            return value;
        }
        // N.B. before the objects are read: what changes meanwhile is in it or has it made again.
        let of = changed().collect();
        let value = Arc::new(make());
        self.made.store(Arc::new(Made { of, value: value.clone() }));
        value
    }
}
