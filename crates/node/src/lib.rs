//! What runs pods in an embedded cluster: scheduler, storage, node agents, and the watch over
//! nodes. All of it speaks to the API as a client, and would run against any other.

pub mod agent;
pub mod lifecycle;
pub mod logs;
pub mod scheduler;
pub mod storage;
pub mod supervise;
