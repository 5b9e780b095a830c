//! The ensign server
