//! What every controller needs: objects that are kept up to date by watches, a queue of what is to
//! be looked at, and events for people.

pub mod events;
pub mod kept;
pub mod lease;
pub mod queue;
pub mod taken;

pub use events::why;
pub use queue::Queue;
