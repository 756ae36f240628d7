// Command app is every program that runs in a pod of this bed, in an image made of nothing else.
//
//	app                   waits (the sandbox of a pod)
//	app serve HTTP TCP    answers HTTP with who and what it saw, as JSON; echoes TCP
//	app get URL           one request on a connection of its own, its answer printed
//	app loop URL          a request every 20 ms, each on a connection of its own, until told to stop
//	app hold HOST:PORT    one connection, a line echoed every 50 ms, until it ends
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

func main() {
	stop, _ := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	if len(os.Args) < 2 {
		<-stop.Done()
		return
	}
	verbs := map[string]struct {
		words int
		run   func(context.Context, []string) error
	}{"serve": {2, serve}, "get": {1, get}, "loop": {1, loop}, "hold": {1, hold}}
	verb, known := verbs[os.Args[1]]
	if !known || len(os.Args) != 2+verb.words {
		fmt.Fprintln(os.Stderr, "usage: app [serve HTTP TCP | get URL | loop URL | hold HOST:PORT]")
		os.Exit(2)
	}
	if err := verb.run(stop, os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "app:", err)
		os.Exit(1)
	}
}

// serve goes on for a while after it was told to stop, as programs do that want a roll-out without a failed request.
func serve(stop context.Context, ports []string) error {
	name, _ := os.Hostname()
	tcp, err := net.Listen("tcp", ":"+ports[1])
	if err != nil {
		return err
	}
	go func() {
		for {
			c, err := tcp.Accept()
			if err != nil {
				return
			}
			go func() { _, _ = io.Copy(c, c); _ = c.Close() }()
		}
	}()
	server := &http.Server{Addr: ":" + ports[0], Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_ = json.NewEncoder(w).Encode(map[string]string{"pod": name, "method": r.Method, "path": r.URL.Path, "host": r.Host, "client": r.RemoteAddr})
	})}
	go func() {
		<-stop.Done()
		time.Sleep(3 * time.Second)
		_ = server.Shutdown(context.Background())
		os.Exit(0)
	}()
	return server.ListenAndServe()
}

func once(url string) (string, error) {
	client := http.Client{Timeout: 8 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	r, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	if err == nil && r.StatusCode != http.StatusOK {
		err = errors.New(r.Status)
	}
	return string(body), err
}

func get(_ context.Context, words []string) error {
	body, err := once(words[0])
	fmt.Print(body)
	return err
}

func loop(stop context.Context, words []string) error {
	held, failures, pods := 0, []string{}, map[string]int{}
	fmt.Println("looping")
	for stop.Err() == nil {
		body, err := once(words[0])
		if err != nil {
			failures = append(failures, time.Now().UTC().Format("15:04:05.000 ")+err.Error())
		} else {
			held++
			var said struct{ Pod string }
			_ = json.Unmarshal([]byte(body), &said)
			pods[said.Pod]++
		}
		time.Sleep(20 * time.Millisecond)
	}
	return json.NewEncoder(os.Stdout).Encode(map[string]any{"held": held, "failures": failures, "pods": pods})
}

func hold(stop context.Context, words []string) error {
	c, err := net.DialTimeout("tcp", words[0], 8*time.Second)
	if err != nil {
		return err
	}
	lines := bufio.NewReader(c)
	for n := 0; stop.Err() == nil; n++ {
		if _, err = fmt.Fprintf(c, "%d\n", n); err != nil {
			return fmt.Errorf("closed after %d lines: %w", n, err)
		}
		_ = c.SetReadDeadline(time.Now().Add(8 * time.Second))
		said, err := lines.ReadString('\n')
		if err != nil || strings.TrimSpace(said) != fmt.Sprint(n) {
			return fmt.Errorf("closed after %d lines: %w", n, err)
		}
		if n == 0 {
			fmt.Println("open")
		}
		time.Sleep(50 * time.Millisecond)
	}
	return nil
}
