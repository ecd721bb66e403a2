//! Admission and subresources.
