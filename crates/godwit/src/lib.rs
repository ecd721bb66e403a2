//! The `godwit` command: CLI, roles, wiring.
