//! ensign-client
