//! The token that tells the CA who asks.
