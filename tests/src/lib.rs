//! End-to-end tests with real guests: the world they live in.
