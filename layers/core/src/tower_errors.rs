//! Tower errors.
