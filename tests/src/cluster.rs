//! Embedded clusters as their users have them: `godwit up`, in a folder of their own.

use anyhow::{Context, Result, bail, ensure};
use kube::Client;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Whatever a cluster does is done within this time, on a busy machine too.
pub const SOON: Duration = Duration::from_secs(60);

/// A cluster in a folder of its own; it ends with the test.
pub struct Cluster {
    /// The program that runs it.
    program: PathBuf,
    /// Its name, which is its id to others.
    name: String,
    /// Variables of its environment.
    environment: Vec<(String, String)>,
    dir: tempfile::TempDir,
    /// As its administrator.
    pub client: Client,
}

/// Memory of a process in bytes: what it alone has (PSS).
///
/// # Errors
/// When it does not run.
pub fn memory(pid: i32) -> Result<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = text.lines().find(|line| line.starts_with("Pss:")).context("no Pss")?;
    let kib: f64 = line.split_whitespace().nth(1).context("no Pss")?.parse()?;
    Ok(kib * 1024.0)
}

/// Runs a command of the program on the clusters of a folder.
///
/// # Errors
/// When it cannot be run.
pub fn godwit(program: &Path, dir: &Path, arguments: &[&str]) -> Result<Output> {
    Ok(command(program, dir, arguments)?.output()?)
}

fn command(program: &Path, dir: &Path, arguments: &[&str]) -> Result<Command> {
    let (command, more) = arguments.split_first().context("no command")?;
    let mut run = Command::new(program);
    run.arg(command).arg("--dir").arg(dir).args(more).stdin(Stdio::null());
    Ok(run)
}

/// The client of a cluster's administrator.
///
/// # Errors
/// When its kubeconfig cannot be read.
pub async fn client(dir: &Path, name: &str) -> Result<Client> {
    let path = dir.join(name).join("kubeconfig");
    let config = kube::config::Kubeconfig::read_from(path)?;
    let mut config = kube::Config::from_custom_kubeconfig(config, &Default::default()).await?;
    // What is refused is what tests want to see.
    config.default_retry = false;
    Ok(Client::try_from(config)?)
}

fn up(
    program: &Path,
    dir: &Path,
    name: &str,
    more: &[&str],
    environment: &[(&str, &str)],
) -> Result<()> {
    // Emulated everywhere: what is tested does not depend on the machine.
    let fixed = ["up", "--detach", "--accelerator", "tcg", "--name", name];
    let mut run = command(program, dir, &[&fixed, more].concat())?;
    let done = run.envs(environment.iter().copied()).output()?;
    ensure!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    Ok(())
}

/// The kubeconfig with a context for each of some clusters: `godwit-NAME`.
///
/// # Errors
/// What `godwit kubeconfig` says.
pub fn contexts(clusters: &[&Cluster]) -> Result<PathBuf> {
    let first = clusters.first().context("no cluster")?;
    let all = first.dir().join("contexts");
    let into = all.to_str().context("a path")?;
    for cluster in clusters {
        let merge = ["kubeconfig", "--name", &cluster.name, "--merge", "--into", into];
        let merged = cluster.godwit(&merge)?;
        ensure!(merged.status.success(), "{}", String::from_utf8_lossy(&merged.stderr));
    }
    Ok(all)
}

/// Links two clusters, by the command for that, or ends their link.
///
/// # Errors
/// What it says.
pub fn link(one: &Cluster, other: &Cluster) -> Result<()> {
    pair("link", one, other)
}

/// Ends that.
///
/// # Errors
/// What it says.
pub fn unlink(one: &Cluster, other: &Cluster) -> Result<()> {
    pair("unlink", one, other)
}

fn pair(act: &str, one: &Cluster, other: &Cluster) -> Result<()> {
    let mut command = Command::new(&one.program);
    command.args(["cluster", act, &format!("godwit-{}", one.name)]);
    command.arg(format!("godwit-{}", other.name));
    let done = command.arg("--kubeconfig").arg(contexts(&[one, other])?).output()?;
    ensure!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    Ok(())
}

impl Cluster {
    /// Starts one; `more` goes to `godwit up`.
    ///
    /// # Errors
    /// What it said.
    pub async fn new(program: &str, more: &[&str]) -> Result<Self> {
        Self::with(program, more, &[]).await
    }

    /// Starts one with variables in its environment.
    ///
    /// # Errors
    /// What it said.
    pub async fn with(program: &str, more: &[&str], environment: &[(&str, &str)]) -> Result<Self> {
        Self::named("local", program, more, environment).await
    }

    /// Starts one of another name.
    ///
    /// # Errors
    /// What it said.
    pub async fn named(
        name: &str,
        program: &str,
        more: &[&str],
        environment: &[(&str, &str)],
    ) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("godwit-").tempdir()?;
        up(Path::new(program), dir.path(), name, more, environment)?;
        let client = client(dir.path(), name).await?;
        let own = environment.iter().map(|(name, value)| ((*name).into(), (*value).into()));
        let (name, environment) = (name.to_owned(), own.collect());
        let cluster = Self { program: program.into(), name, environment, dir, client };
        cluster.until("/api/v1/namespaces/default/serviceaccounts/default", |_| true).await?;
        Ok(cluster)
    }

    /// The program that runs it.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// The folder of the clusters' folders.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Starts it again.
    ///
    /// # Errors
    /// What it said.
    pub fn up(&self, more: &[&str]) -> Result<()> {
        let own = self.environment.iter().map(|(name, value)| (&**name, &**value));
        up(&self.program, self.dir(), &self.name, more, &own.collect::<Vec<_>>())
    }

    /// Ends it, with all that it runs, and starts it again with another program.
    ///
    /// # Errors
    /// What it said.
    pub async fn come_back_as(&mut self, program: &str, more: &[&str]) -> Result<()> {
        let ended = self.godwit(&["down", "--name", &self.name])?;
        ensure!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
        self.program = program.into();
        self.up(more)?;
        self.client = client(self.dir(), &self.name).await?;
        Ok(())
    }

    /// Runs a command of the program on it.
    ///
    /// # Errors
    /// When it cannot be run.
    pub fn godwit(&self, arguments: &[&str]) -> Result<Output> {
        godwit(&self.program, self.dir(), arguments)
    }

    /// Runs kubectl; returns whether it succeeded, and what it said. None: there is none that is
    /// new enough.
    pub fn kubectl(&self, arguments: &[&str]) -> Option<(bool, String)> {
        let version = ["version", "--client", "-o", "json"];
        let version = Command::new("kubectl").args(version).output().ok()?;
        let version: Value = serde_json::from_slice(&version.stdout).ok()?;
        let minor = version["clientVersion"]["minor"].as_str()?.trim_end_matches('+');
        if minor.parse::<u32>().ok()? < 27 {
            return None;
        }
        let mut command = Command::new("kubectl");
        command.arg("--kubeconfig").arg(self.path("kubeconfig")).args(arguments);
        command.env("HOME", self.dir()).env_remove("KUBECONFIG").stdin(Stdio::null());
        let output = command.output().ok()?;
        let said = [output.stdout, output.stderr].concat();
        Some((output.status.success(), String::from_utf8_lossy(&said).into_owned()))
    }

    /// What is in its folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(&self.name).join(name)
    }

    /// Ends it as a crash does.
    ///
    /// # Errors
    /// Why not.
    pub fn kill(&self) -> Result<()> {
        let pid = self.pid()?;
        crate::vms::kill(pid)?;
        // It holds its folder until it is gone.
        let began = Instant::now();
        while crate::vms::is_alive(pid) {
            ensure!(began.elapsed() < SOON, "process {pid} does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Its process, in which all roles are that have none of their own.
    ///
    /// # Errors
    /// When it does not run.
    pub fn pid(&self) -> Result<i32> {
        let record: Value = serde_json::from_slice(&std::fs::read(self.path("cluster.json"))?)?;
        Ok(i32::try_from(record["pid"].as_i64().context("no pid")?)?)
    }

    /// The roles that run as processes of their own, as `godwit status` tells them.
    ///
    /// # Errors
    /// When it does not.
    pub fn roles(&self) -> Result<BTreeMap<String, i32>> {
        let told = self.godwit(&["status", "-o", "json"])?;
        let told: Value = serde_json::from_slice(&told.stdout)?;
        let roles = told[0]["roles"].as_array().context("no roles")?.iter();
        let role = |role: &Value| {
            Some((role["name"].as_str()?.to_owned(), i32::try_from(role["pid"].as_i64()?).ok()?))
        };
        Ok(roles.filter_map(role).collect())
    }

    /// Waits until a role runs as another process.
    ///
    /// # Errors
    /// When it does not.
    pub fn until_role(&self, name: &str, than: Option<i32>) -> Result<i32> {
        let began = Instant::now();
        loop {
            match self.roles()?.get(name) {
                Some(pid) if Some(*pid) != than => return Ok(*pid),
                _ if began.elapsed() > SOON => bail!("{name} is not started again"),
                _ => std::thread::sleep(Duration::from_millis(50)),
            }
        }
    }

    /// The processes that were started for its pods.
    ///
    /// # Errors
    /// Why not.
    pub fn processes(&self) -> Result<Vec<i32>> {
        let folder = self.path("machine");
        let folder = folder.to_str().context("no text")?;
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/proc")?.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            let read = |file: &str| std::fs::read(entry.path().join(file)).unwrap_or_default();
            let all = [read("cmdline"), read("environ")].concat();
            if String::from_utf8_lossy(&all).contains(folder) {
                found.push(pid);
            }
        }
        Ok(found)
    }

    /// Sends a request.
    ///
    /// # Errors
    /// Why not.
    pub async fn send(&self, method: &str, path: &str, body: Option<Value>) -> Result<Value> {
        let media = match method {
            "PATCH" => "application/merge-patch+json",
            _ => "application/json",
        };
        let body = body.map_or_else(Vec::new, |body| body.to_string().into_bytes());
        let request =
            http::Request::builder().method(method).uri(path).header("Content-Type", media);
        Ok(self.client.request(request.body(body)?).await?)
    }

    /// Creates an object.
    ///
    /// # Errors
    /// Why not.
    pub async fn create(&self, path: &str, object: Value) -> Result<Value> {
        self.send("POST", path, Some(object)).await
    }

    /// Waits until an object is as awaited.
    ///
    /// # Errors
    /// Why not.
    pub async fn until(&self, path: &str, holds: impl Fn(&Value) -> bool) -> Result<Value> {
        let began = Instant::now();
        loop {
            let found = self.send("GET", path, None).await;
            match found {
                Ok(object) if holds(&object) => return Ok(object),
                found if began.elapsed() > SOON => {
                    let logs = self.keep_logs();
                    bail!("{path} is not as awaited: {found:?}; logs are in {}", logs.display());
                }
                _ => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    /// Waits until an object is gone.
    ///
    /// # Errors
    /// Why not.
    pub async fn until_gone(&self, path: &str) -> Result<()> {
        let began = Instant::now();
        while let Ok(found) = self.send("GET", path, None).await {
            ensure!(began.elapsed() < SOON, "{path} is still there: {found}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// Keeps all that it has logged, of what went wrong; says where.
    pub fn keep_logs(&self) -> PathBuf {
        let name = self.dir.path().file_name().unwrap_or_default();
        let kept = crate::guest::root().join("target/failed").join(name);
        let mut folders = vec![self.path("")];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
                let path = entry.path();
                let is_log = path.to_string_lossy().contains("log");
                match entry.file_type() {
                    Ok(kind) if kind.is_dir() => folders.push(path),
                    Ok(kind) if kind.is_file() && is_log => {
                        let place = path.strip_prefix(self.path("")).unwrap_or(&path);
                        let flat = place.to_string_lossy().replace('/', "+");
                        let _ = std::fs::create_dir_all(&kept);
                        let _ = std::fs::copy(&path, kept.join(flat));
                    }
                    _ => {}
                }
            }
        }
        kept
    }

    /// Reads a pod's log.
    ///
    /// # Errors
    /// Why not.
    pub async fn log(&self, pod: &str, query: &str) -> Result<String> {
        self.text(&format!("/api/v1/namespaces/default/pods/{pod}/log?{query}")).await
    }

    /// Reads a page that is no object.
    ///
    /// # Errors
    /// Why not.
    pub async fn text(&self, path: &str) -> Result<String> {
        Ok(self.client.request_text(http::Request::get(path).body(Vec::new())?).await?)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let _ = self.godwit(&["down", "--name", &self.name]);
    }
}
