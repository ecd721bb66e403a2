//! Probes and hooks: what is asked of a running container.

use super::command::expand;
use super::record::Run;
use bytes::Bytes;
use http_body_util::Empty;
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::{
    Container, ExecAction, HTTPGetAction, HTTPHeader, LifecycleHandler, Probe, TCPSocketAction,
};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use std::process::Stdio;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::process::Command;

/// How a container answers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Health {
    /// It has started: its start hook and startup probe are passed.
    pub started: bool,
    /// It is ready for work.
    pub ready: bool,
    /// It is to be ended, and why.
    pub sick: Option<String>,
    /// What last went wrong, to be told: which probe, and how.
    pub unhealthy: Option<String>,
}

/// What is asked.
enum Question<'a> {
    Exec(&'a ExecAction),
    Http(&'a HTTPGetAction),
    Tcp(&'a TCPSocketAction),
    Sleep(i64),
}

/// A container that is asked.
pub struct Asked {
    /// As it is specified.
    pub container: Container,
    /// How it was started: what is run in it has the same environment.
    pub run: Run,
    /// The pod's address.
    pub address: String,
    /// Finds the program of a name in the container's image.
    pub image: super::images::Image,
}

fn seconds(n: Option<i32>, default: u64) -> Duration {
    Duration::from_secs(n.and_then(|n| u64::try_from(n).ok()).filter(|n| *n > 0).unwrap_or(default))
}

fn of_probe(probe: &Probe) -> Result<Question<'_>, String> {
    let exec = probe.exec.as_ref().map(Question::Exec);
    let http = || probe.http_get.as_ref().map(Question::Http);
    let tcp = || probe.tcp_socket.as_ref().map(Question::Tcp);
    exec.or_else(http)
        .or_else(tcp)
        .ok_or("this node asks by exec, httpGet and tcpSocket only".into())
}

fn of_hook(hook: &LifecycleHandler) -> Result<Question<'_>, String> {
    let exec = hook.exec.as_ref().map(Question::Exec);
    let http = || hook.http_get.as_ref().map(Question::Http);
    let tcp = || hook.tcp_socket.as_ref().map(Question::Tcp);
    let sleep = || hook.sleep.as_ref().map(|sleep| Question::Sleep(sleep.seconds));
    exec.or_else(http).or_else(tcp).or_else(sleep).ok_or("the hook says nothing".into())
}

impl Asked {
    /// Asks until it is dropped, or the container is found sick; tells every change.
    pub async fn watch_over(self, tell: impl Fn(Health)) {
        let mut health = Health::default();
        let hook = self.container.lifecycle.as_ref().and_then(|all| all.post_start.as_ref());
        if let Some(hook) = hook
            && let Err(why) = self.hook(hook).await
        {
            health.sick = Some(format!("its postStart hook failed: {why}"));
            return tell(health);
        }
        if let Some(probe) = &self.container.startup_probe
            && let Err(why) = self.until(probe, "Startup", true, |_| {}).await
        {
            health.sick = Some(why);
            return tell(health);
        }
        health.started = true;
        health.ready = self.container.readiness_probe.is_none();
        let health = std::sync::Mutex::new(health);
        let change = |change: &dyn Fn(&mut Health)| {
            let Ok(mut now) = health.lock() else { return };
            let before = now.clone();
            change(&mut now);
            if *now != before {
                tell(now.clone());
            }
        };
        if let Ok(now) = health.lock() {
            tell(now.clone());
        }
        let lives = async {
            let Some(probe) = &self.container.liveness_probe else { return };
            if let Err(why) = self.until(probe, "Liveness", false, |_| {}).await {
                change(&|health| health.sick = Some(why.clone()));
            }
        };
        let ready = async {
            let Some(probe) = &self.container.readiness_probe else { return };
            let say = |found: Result<(), String>| {
                change(&|health| {
                    health.ready = found.is_ok();
                    health.unhealthy = found.as_ref().err().cloned();
                });
            };
            loop {
                // It fails for good only with the container.
                let _ = self.until(probe, "Readiness", false, say).await;
            }
        };
        tokio::join!(lives, ready);
    }

    /// Asks again and again: until it has failed often enough; or, when `once`, succeeded so.
    async fn until(
        &self,
        probe: &Probe,
        name: &str,
        once: bool,
        say: impl Fn(Result<(), String>),
    ) -> Result<(), String> {
        let often = |n: Option<i32>, default: i32| n.unwrap_or(default).max(1);
        let (enough, too_many) =
            (often(probe.success_threshold, 1), often(probe.failure_threshold, 3));
        let (mut good, mut bad) = (0, 0);
        let delay = probe.initial_delay_seconds.unwrap_or(0);
        tokio::time::sleep(Duration::from_secs(u64::try_from(delay).unwrap_or(0))).await;
        loop {
            let limit = seconds(probe.timeout_seconds, 1);
            match self.ask(of_probe(probe), limit).await {
                Ok(()) => (good, bad) = (good + 1, 0),
                Err(why) => {
                    (good, bad) = (0, bad + 1);
                    if bad >= too_many {
                        let text = format!("{name} probe failed: {why}");
                        say(Err(text.clone()));
                        return Err(text);
                    }
                }
            }
            if good >= enough {
                say(Ok(()));
                if once {
                    return Ok(());
                }
            }
            tokio::time::sleep(seconds(probe.period_seconds, 10)).await;
        }
    }

    /// Runs a hook, for as long as it takes: who waits for it has a limit of its own.
    ///
    /// # Errors
    /// How it failed.
    pub async fn hook(&self, hook: &LifecycleHandler) -> Result<(), String> {
        self.ask(of_hook(hook), Duration::from_secs(3600)).await
    }

    async fn ask(
        &self,
        question: Result<Question<'_>, String>,
        limit: Duration,
    ) -> Result<(), String> {
        let answer = async {
            match question? {
                Question::Exec(exec) => self.exec(exec).await,
                Question::Http(get) => self.get(get).await,
                Question::Tcp(socket) => {
                    let host = socket.host.as_deref().unwrap_or(&self.address);
                    let port = self.port(&socket.port)?;
                    TcpStream::connect((host, port)).await.map(drop).map_err(|e| e.to_string())
                }
                Question::Sleep(seconds) => {
                    let seconds = u64::try_from(seconds).unwrap_or(0);
                    tokio::time::sleep(Duration::from_secs(seconds)).await;
                    Ok(())
                }
            }
        };
        let answer = tokio::time::timeout(limit, answer).await;
        answer.unwrap_or_else(|_| Err(format!("no answer within {limit:?}")))
    }

    fn port(&self, port: &IntOrString) -> Result<u16, String> {
        let number = match port {
            IntOrString::Int(number) => Some(*number),
            IntOrString::String(name) => {
                let mut ports = self.container.ports.iter().flatten();
                let named = ports.find(|port| port.name.as_ref() == Some(name));
                named.map(|port| port.container_port).or_else(|| name.parse().ok())
            }
        };
        number.and_then(|n| u16::try_from(n).ok()).ok_or(format!("{port:?} is no port of it"))
    }

    async fn exec(&self, exec: &ExecAction) -> Result<(), String> {
        let environment = &self.run.environment;
        let words: Vec<String> =
            exec.command.iter().flatten().map(|word| expand(word, environment)).collect();
        let (name, arguments) = words.split_first().ok_or("exec has no command")?;
        let program = self.image.program(name);
        let program = program.ok_or(format!("{name:?} is not in the image"))?;
        let status = Command::new(program)
            .args(arguments)
            .env_clear()
            .envs(environment.iter().map(|(name, value)| (name, value)))
            .current_dir(&self.run.directory)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .kill_on_drop(true)
            .status();
        let status = status.await.map_err(|error| error.to_string())?;
        if status.success() { Ok(()) } else { Err(format!("the command ended with {status}")) }
    }

    async fn get(&self, get: &HTTPGetAction) -> Result<(), String> {
        if get.scheme.as_deref().is_some_and(|scheme| scheme != "HTTP") {
            return Err("this node asks by plain HTTP only".into());
        }
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let host = get.host.as_deref().filter(|host| !host.is_empty()).unwrap_or(&self.address);
        let port = self.port(&get.port)?;
        let stream = TcpStream::connect((host, port)).await.map_err(|e| text(&e))?;
        let shaken = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
        let (mut sender, connection) = shaken.map_err(|e| text(&e))?;
        let mut request = http::Request::get(get.path.as_deref().unwrap_or("/"))
            .header("Host", format!("{host}:{port}"))
            .header("User-Agent", "kube-probe/1.33");
        for HTTPHeader { name, value } in get.http_headers.iter().flatten() {
            request = request.header(name, value);
        }
        let request = request.body(Empty::<Bytes>::new()).map_err(|e| text(&e))?;
        // The connection is driven for as long as the answer is waited for.
        let code = tokio::select! {
            answer = sender.send_request(request) => answer.map_err(|e| text(&e))?.status(),
            _ = connection => return Err("the connection was closed".into()),
        };
        match code.as_u16() {
            200..=399 => Ok(()),
            code => Err(format!("HTTP probe failed with statuscode: {code}")),
        }
    }
}
