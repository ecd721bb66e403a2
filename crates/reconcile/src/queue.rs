//! A queue of keys: each is looked at once however often it was rung for, never by two at the same
//! time, again after a change that came meanwhile, and again later when that was asked for.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use tokio::task::JoinSet;

/// Pauses after failures double from the first to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LAST_PAUSE: Duration = Duration::from_secs(30);

/// What becomes of a key that was looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// It rests until it is rung for.
    Rest,
    /// It is looked at again after this, or when it is rung for.
    After(Duration),
    /// It went wrong: again after a pause that grows.
    Failed,
}

/// A queue that can be shared.
#[derive(Debug)]
pub struct Queue<K> {
    shared: Arc<Shared<K>>,
}

impl<K> Clone for Queue<K> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

#[derive(Debug)]
struct Shared<K> {
    state: Mutex<State<K>>,
    bell: Notify,
}

#[derive(Debug)]
struct State<K> {
    waiting: VecDeque<K>,
    queued: HashSet<K>,
    /// With whether it was rung for meanwhile.
    busy: HashMap<K, bool>,
    later: BTreeMap<(Instant, u64), K>,
    /// Where in `later` a key is.
    due: HashMap<K, (Instant, u64)>,
    failures: HashMap<K, u32>,
    count: u64,
}

impl<K: Clone + Eq + Hash + Send + 'static> Default for Queue<K> {
    fn default() -> Self {
        let state = State {
            waiting: VecDeque::new(),
            queued: HashSet::new(),
            busy: HashMap::new(),
            later: BTreeMap::new(),
            due: HashMap::new(),
            failures: HashMap::new(),
            count: 0,
        };
        Self { shared: Arc::new(Shared { state: Mutex::new(state), bell: Notify::new() }) }
    }
}

impl<K: Clone + Eq + Hash + Send + 'static> State<K> {
    fn add(&mut self, key: K) {
        if let Some(rung) = self.busy.get_mut(&key) {
            *rung = true;
        } else if self.queued.insert(key.clone()) {
            self.waiting.push_back(key);
        }
    }

    fn add_later(&mut self, key: K, at: Instant) {
        match self.due.get(&key) {
            Some(due) if due.0 <= at => return,
            Some(due) => {
                let due = *due;
                self.later.remove(&due);
            }
            None => {}
        }
        self.count += 1;
        let due = (at, self.count);
        self.due.insert(key.clone(), due);
        self.later.insert(due, key);
    }

    /// Takes a key that is to be looked at now; or says until when nothing is due.
    fn take(&mut self, now: Instant) -> Result<K, Option<Instant>> {
        while let Some((&due, _)) = self.later.first_key_value().filter(|((at, _), _)| *at <= now) {
            if let Some(key) = self.later.remove(&due) {
                self.due.remove(&key);
                self.add(key);
            }
        }
        let next = self.later.first_key_value().map(|((at, _), _)| *at);
        let key = self.waiting.pop_front().ok_or(next)?;
        self.queued.remove(&key);
        self.busy.insert(key.clone(), false);
        Ok(key)
    }

    fn done(&mut self, key: K, next: Next, now: Instant) {
        let rung = self.busy.remove(&key).unwrap_or(false);
        match next {
            Next::Failed => {
                let failures = self.failures.entry(key.clone()).or_insert(0);
                let pause = FIRST_PAUSE * 2_u32.saturating_pow(*failures).min(1024);
                *failures += 1;
                return self.add_later(key, now + pause.min(LAST_PAUSE));
            }
            Next::After(pause) => self.add_later(key.clone(), now + pause),
            Next::Rest => {}
        }
        self.failures.remove(&key);
        if rung {
            self.add(key);
        }
    }
}

impl<K: Clone + Eq + Hash + Send + 'static> Queue<K> {
    fn lock(&self) -> MutexGuard<'_, State<K>> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Rings for a key.
    pub fn ring(&self, key: K) {
        self.lock().add(key);
        self.shared.bell.notify_one();
    }

    /// Looks at keys as they are rung for, so many at the same time. Never ends by itself.
    pub async fn run<F>(&self, at_once: usize, look: impl Fn(K) -> F)
    where
        F: Future<Output = Next> + Send + 'static,
        K: Sync,
    {
        let mut tasks: JoinSet<()> = JoinSet::new();
        loop {
            while tasks.try_join_next().is_some() {}
            let taken = match tasks.len() < at_once {
                true => self.lock().take(Instant::now()),
                false => Err(None),
            };
            match taken {
                Ok(key) => {
                    let (queue, looking) = (self.clone(), look(key.clone()));
                    tasks.spawn(async move {
                        // N.B. a look that panics counts as failed: its key must not stay busy. It
                        // is a set, so that a look ends when all of this is dropped.
                        let mut one = JoinSet::from_iter([looking]);
                        let looked = one.join_next().await;
                        let next = looked.and_then(Result::ok).unwrap_or(Next::Failed);
                        queue.lock().done(key, next, Instant::now());
                    });
                }
                Err(until) => {
                    let until = until.unwrap_or_else(|| Instant::now() + LAST_PAUSE);
                    tokio::select! {
                        () = self.shared.bell.notified() => {}
                        // N.B. the end of a look is that of its task: one that rang before it was
                        // over would be counted as going on.
                        Some(_) = tasks.join_next() => {}
                        () = tokio::time::sleep_until(until.into()) => {}
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_key_is_looked_at_by_one_and_again_when_it_was_rung_for_meanwhile() {
        let queue = Queue::default();
        let now = Instant::now();
        queue.ring("a");
        queue.ring("a");
        assert_eq!(queue.lock().take(now), Ok("a"));
        queue.ring("a");
        assert_eq!(queue.lock().take(now), Err(None));
        queue.lock().done("a", Next::Rest, now);
        assert_eq!(queue.lock().take(now), Ok("a"));
        queue.lock().done("a", Next::After(Duration::from_secs(1)), now);
        assert!(queue.lock().take(now).is_err());
        assert_eq!(queue.lock().take(now + Duration::from_secs(1)), Ok("a"));
        queue.lock().done("a", Next::Failed, now);
        assert_eq!(queue.lock().take(now), Err(Some(now + FIRST_PAUSE)));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn keys_that_wait_for_a_free_hand_get_it_when_a_look_is_over() {
        let (queue, done) = (Queue::default(), Arc::new(Mutex::new(0)));
        (0..20_000).for_each(|key| queue.ring(key));
        let run = {
            let (queue, done) = (queue.clone(), Arc::clone(&done));
            tokio::spawn(async move {
                let look = |_| {
                    let done = Arc::clone(&done);
                    async move {
                        *done.lock().unwrap() += 1;
                        Next::Rest
                    }
                };
                queue.run(1, look).await;
            })
        };
        let end = Instant::now() + LAST_PAUSE / 2;
        while *done.lock().unwrap() < 20_000 {
            assert!(Instant::now() < end, "only {} were looked at", done.lock().unwrap());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        run.abort();
    }
}
