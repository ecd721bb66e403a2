//! Who may run the VM: states, events, actions and wire messages of a move. Pure.
