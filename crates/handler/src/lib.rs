//! One host's agent.
