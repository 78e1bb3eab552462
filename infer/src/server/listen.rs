//! The listening socket: connections within a bound, and an end that lets answers be finished.

use std::{
    io,
    pin::pin,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures_util::future;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
    service::TowerToHyperService,
};
use tokio::{
    net::TcpListener,
    sync::Semaphore,
    time::{sleep, timeout},
};

use super::Server;

/// How long a client may take for the head of a request.
const HEAD: Duration = Duration::from_secs(30);

/// Pause after a connection could not be accepted, for instance because there are too many open files.
const RETRY: Duration = Duration::from_millis(100);

/// Answers requests until `shutdown` is ready, then accepts no more and gives those that run the time that any request
/// has.
///
/// # Errors
/// A listener that cannot be used; a connection that fails is no error of the server.
pub async fn serve(
    server: Arc<Server>,
    listener: std::net::TcpListener,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = TcpListener::from_std(listener)?;
    let limits = server.settings.limits;
    let places = Arc::new(Semaphore::new(limits.connections));
    let router = server.router();
    let graceful = GracefulShutdown::new();
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD);

    let accept = async {
        loop {
            let place = Arc::clone(&places).acquire_owned().await;
            let place = place.expect("the semaphore is never closed");
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!("a connection cannot be accepted: {error}");
                    sleep(RETRY).await;
                    continue;
                }
            };
            // Pieces of a streamed answer are small and wanted at once.
            if let Err(error) = stream.set_nodelay(true) {
                tracing::debug!("TCP_NODELAY: {error}");
            }
            let service = TowerToHyperService::new(router.clone());
            let connection = http.serve_connection(TokioIo::new(stream), service);
            let connection = graceful.watch(connection);
            tokio::spawn(async move {
                if let Err(error) = connection.await {
                    tracing::debug!("a connection ended: {error}");
                }
                drop(place);
            });
        }
    };
    future::select(pin!(accept), pin!(shutdown)).await;
    server.stopping.store(true, Ordering::Relaxed);
    drop(listener);
    let open = graceful.count();
    if open > 0 {
        tracing::info!("stopping: {open} connections are open");
    }
    if timeout(limits.time, graceful.shutdown()).await.is_err() {
        tracing::warn!("stopped before all answers were complete");
    }
    server.service.shut_down();
    Ok(())
}
