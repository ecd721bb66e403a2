//! One VM: QEMU, mover and handover put together.
