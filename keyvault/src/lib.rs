//! ensign-keyvault
