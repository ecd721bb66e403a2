//! Identities, mTLS streams, preface, gateway and relay.
