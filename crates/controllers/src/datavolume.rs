//! placeholder
use crate::world::World;
/// x
pub async fn run(_world: World) {
    std::future::pending::<()>().await
}
