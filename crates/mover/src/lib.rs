//! Moves disks: rounds, extents, wire format, checkpoints, resume, verification.
