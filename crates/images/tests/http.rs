//! Downloads survive what networks do to them.

mod common;

use std::time::Duration;

use common::server::{Fault, Server, Site};
use common::{Bench, MIB, assert_same, import, noise};
use images::{Credentials, Error, Http, Progress, Source};
use tokio::sync::watch;

fn http(server: &Server) -> Source {
    Source::Http(Http { url: server.url(), ..Http::default() })
}

fn checked(server: &Server, checksum: &str) -> Source {
    let checksum = Some(checksum.parse().unwrap());
    Source::Http(Http { url: server.url(), checksum, ..Http::default() })
}

#[tokio::test]
async fn a_cut_download_resumes_without_fetching_again() {
    let (bench, body) = (Bench::new(), noise(5 * MIB, 1));
    let faults = [Fault::Cut(2 * MIB), Fault::Cut(MIB / 3)].into();
    let site = Site { body: body.clone(), ranges: true, faults, ..Site::default() };
    let server = Server::start(site).await;
    let imported = import(&bench.job(http(&server), "disk", 5 * MIB)).await.unwrap();
    assert_same(&bench.path("disk"), &body);
    assert_eq!(imported.bytes_moved, 5 * MIB as u64);
    let site = server.site();
    assert_eq!(site.sent, 5 * MIB);
    assert!(site.requests[1].contains("range: bytes=2097152-\r\n"), "{}", site.requests[1]);
}

#[tokio::test]
async fn an_import_that_was_given_up_goes_on() {
    let (bench, body) = (Bench::new(), noise(5 * MIB, 2));
    let faults = [Fault::Stall(3 * MIB + 77)].into();
    let site = Site { body: body.clone(), ranges: true, faults, ..Site::default() };
    let server = Server::start(site).await;
    let job = bench.job(http(&server), "disk", 6 * MIB);
    let given_up = tokio::time::timeout(Duration::from_secs(1), import(&job)).await;
    assert!(given_up.is_err());
    import(&job).await.unwrap();
    assert_same(&bench.path("disk"), &common::padded(&body, 6 * MIB));
    // What was not yet in the file, which is less than a piece, is fetched again.
    let again = server.site().sent - 5 * MIB;
    assert!(again < MIB, "{again} bytes were fetched again");
}

#[tokio::test]
async fn after_a_crash_only_what_is_durable_counts() {
    let (bench, body) = (Bench::new(), noise(4 * MIB, 9));
    let faults = [Fault::Stall(3 * MIB)].into();
    let site = Site { body: body.clone(), ranges: true, faults, ..Site::default() };
    let server = Server::start(site).await;
    let job = bench.job(http(&server), "disk", 4 * MIB);
    let given_up = tokio::time::timeout(Duration::from_secs(1), import(&job)).await;
    assert!(given_up.is_err());
    let (partial, state) = ("disk.work/download.partial", "disk.work/download.json");
    let mut known: serde_json::Value =
        serde_json::from_slice(&std::fs::read(bench.path(state)).unwrap()).unwrap();
    known["boot"] = "before".into();
    bench.file(state, known.to_string().as_bytes());
    bench.file(partial, &[0xaa; 3 * MIB]);
    import(&job).await.unwrap();
    assert_same(&bench.path("disk"), &body);
}

#[tokio::test]
async fn a_silent_server_is_asked_again_and_is_told_of_until_it_answers() {
    let (bench, body) = (Bench::new(), noise(2 * MIB, 6));
    let faults = [Fault::Stall(MIB)].into();
    let site = Site { body: body.clone(), ranges: true, faults, ..Site::default() };
    let server = Server::start(site).await;
    let mut job = bench.job(http(&server), "disk", 2 * MIB);
    job.limits.stall = Duration::from_millis(300);
    let (reports, mut seen) = watch::channel(Progress::default());
    let last = reports.subscribe();
    let told = async {
        let is_broken = |progress: &Progress| progress.broken.is_some();
        seen.wait_for(is_broken).await.map(|progress| progress.done)
    };
    let imported = async move { images::import(&job, &reports).await };
    let (imported, told) = tokio::join!(imported, told);
    imported.unwrap();
    assert_eq!(told.unwrap(), MIB as u64, "it is told what had come");
    assert_eq!(last.borrow().broken, None);
    assert_same(&bench.path("disk"), &body);
    assert_eq!(server.site().sent, 2 * MIB);
}

#[tokio::test]
async fn one_job_that_runs_twice_at_once_fetches_once() {
    let (bench, body) = (Bench::new(), noise(2 * MIB, 7));
    let server = Server::start(Site { body: body.clone(), ..Site::default() }).await;
    let job = bench.job(http(&server), "disk", 2 * MIB);
    let (one, two) = tokio::join!(import(&job), import(&job));
    assert_eq!(one.unwrap(), two.unwrap());
    assert_same(&bench.path("disk"), &body);
    assert_eq!(server.site().sent, 2 * MIB);
}

#[tokio::test]
async fn a_server_without_ranges_is_asked_for_all_again() {
    let (bench, body) = (Bench::new(), noise(2 * MIB, 3));
    let faults = [Fault::Cut(MIB)].into();
    let server = Server::start(Site { body: body.clone(), faults, ..Site::default() }).await;
    import(&bench.job(http(&server), "disk", 2 * MIB)).await.unwrap();
    assert_same(&bench.path("disk"), &body);
    assert_eq!(server.site().sent, 3 * MIB);
}

#[tokio::test]
async fn a_changed_object_is_fetched_anew() {
    let (bench, new) = (Bench::new(), noise(3 * MIB, 5));
    for careless in [false, true] {
        let faults = [Fault::Change(MIB, new.clone())].into();
        let body = noise(4 * MIB, 4);
        let site = Site { body, ranges: true, careless, faults, ..Site::default() };
        let server = Server::start(site).await;
        let name = format!("disk-{careless}");
        import(&bench.job(http(&server), &name, 4 * MIB)).await.unwrap();
        assert_same(&bench.path(&name), &common::padded(&new, 4 * MIB));
    }
}

#[tokio::test]
async fn a_wrong_checksum_writes_nothing() {
    let (bench, body) = (Bench::new(), b"a disk".to_vec());
    let server = Server::start(Site { body, ..Site::default() }).await;
    let wrong = format!("sha256:{}", "0".repeat(64));
    let error = import(&bench.job(checked(&server, &wrong), "disk", MIB)).await.unwrap_err();
    assert!(matches!(error, Error::Checksum { .. }), "{error}");
    assert!(!bench.path("disk").exists());
    assert!(!bench.path("disk.work").join("download.partial").exists());
    let sha512 = "228b5c55af99605260bad5d5e1041d3b6c71e8a18efa850d068f6a4410297eef\
                  1a6008d1f447917c1f7633ce59abd926f9c4521953d6b51e4fab6246a91ef266";
    for (kind, right) in [
        ("md5", "9f3dcc17b3660ff7eb3be3e5f62f58c7"),
        ("sha1", "328791013a252c0cc07ea746ddc5e1828562cd36"),
        ("sha256", "d614d695eb483126af8a5376433956a60f472ea41b5147893a461e1823006387"),
        ("sha512", sha512),
    ] {
        let source = checked(&server, &format!("{kind}:{}", right.to_uppercase()));
        import(&bench.job(source, kind, 512)).await.unwrap();
        assert_same(&bench.path(kind), &common::padded(b"a disk", 512));
    }
}

#[tokio::test]
async fn secrets_stay_with_their_server() {
    let bench = Bench::new();
    let other = Server::start(Site { body: vec![1; 512], ..Site::default() }).await;
    let site = Site { redirect: Some(other.url()), ..Site::default() };
    let server = Server::start(site).await;
    let source = Source::Http(Http {
        url: server.url(),
        headers: vec![("X-Token".into(), "secret".into())],
        credentials: Some(Credentials { user: "me".into(), password: "secret".into() }),
        ..Http::default()
    });
    assert!(!format!("{source:?}").contains("secret"));
    import(&bench.job(source, "disk", MIB)).await.unwrap();
    let first = server.site().requests[0].to_lowercase();
    assert!(first.contains("x-token: secret") && first.contains("authorization: basic"));
    let second = other.site().requests[0].to_lowercase();
    assert!(!second.contains("secret") && !second.contains("authorization"), "{second}");
}

#[tokio::test]
async fn a_download_is_bounded() {
    let bench = Bench::new();
    let server = Server::start(Site { body: vec![1; 2 * MIB], ..Site::default() }).await;
    let mut job = bench.job(http(&server), "disk", 4 * MIB);
    job.limits.max_bytes = MIB as u64;
    let error = import(&job).await.unwrap_err();
    assert!(matches!(error, Error::TooManyBytes { limit: 1_048_576, .. }), "{error}");
    assert!(!bench.path("disk").exists());
}
