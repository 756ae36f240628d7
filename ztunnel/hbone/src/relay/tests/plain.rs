//! Two sockets, and bulk that goes past us.

use super::*;

/// Two programs, with one relay between them.
async fn plain() -> (TcpStream, TcpStream, impl Future<Output = Result<(), Failure>>) {
    let (client, down) = tcp().await;
    let (up, server) = tcp().await;
    (client, server, relay(Tcp::from(down), Tcp::from(up), &()))
}

#[tokio::test]
async fn nothing_is_lost_where_bulk_goes_past_us() {
    for (seed, total) in [(1, 0), (2, 1), (3, 1_048_577), (4, 40_000_000)] {
        let (client, server, relayed) = plain().await;
        let (client_in, client_out) = client.into_split();
        let (server_in, server_out) = server.into_split();
        let mut random = fastrand::Rng::with_seed(seed);
        let (outcome, ..) = within(async {
            tokio::join!(
                relayed,
                send(client_out, total, 1, random.fork()),
                receive(server_in, total, 1, random.fork()),
                send(server_out, total / 2, 2, random.fork()),
                receive(client_in, total / 2, 2, random.fork()),
            )
        })
        .await;
        outcome.unwrap();
    }
}

/// Bulk, then small talk, then bulk: who waits holds no pipe.
#[tokio::test]
async fn small_talk_follows_bulk() {
    let (mut client, mut server, relayed) = plain().await;
    let talk = async {
        for size in [3 << 20, 1, 17, 2 << 20, 5] {
            let said = vec![9; size];
            let mut heard = vec![0; size];
            let (written, read) =
                tokio::join!(client.write_all(&said), server.read_exact(&mut heard));
            written.unwrap();
            read.unwrap();
            assert!(heard == said);
            server.write_all(b"yes").await.unwrap();
            let mut yes = [0; 3];
            client.read_exact(&mut yes).await.unwrap();
        }
        client.shutdown().await.unwrap();
        assert_eq!(server.read(&mut [0; 1]).await.unwrap(), 0);
        server.write_all(b"after the end").await.unwrap();
        drop(server);
        let mut last = Vec::new();
        client.read_to_end(&mut last).await.unwrap();
        assert_eq!(last, b"after the end");
    };
    let (outcome, ()) = within(async { tokio::join!(relayed, talk) }).await;
    outcome.unwrap();
}

#[tokio::test]
async fn a_reset_of_bulk_arrives_as_a_reset() {
    let (mut client, mut server, relayed) = plain().await;
    let cut = async {
        let said = vec![9; 4 << 20];
        let mut heard = vec![0; said.len()];
        let (written, read) = tokio::join!(client.write_all(&said), server.read_exact(&mut heard));
        written.unwrap();
        read.unwrap();
        cut_off(client, &mut server).await;
    };
    let (outcome, ()) = within(async { tokio::join!(relayed, cut) }).await;
    assert_eq!(reset_by(outcome), Side::Downstream);
}
