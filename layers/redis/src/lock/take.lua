-- KEYS: the lock, its fence.
-- ARGV: the owner, the lease in milliseconds, how long the fence is kept in
-- milliseconds (0: for ever).
local left = redis.call('PTTL', KEYS[1])
if left == -1 then
  -- Nothing of ours is without an end: a foreign value gets one.
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
  left = tonumber(ARGV[2])
end
if left >= 0 then
  return {0, math.max(left, 1)}
end
local time = redis.call('TIME')
local token = tonumber(time[1]) * 1000000 + tonumber(time[2])
local last = redis.pcall('GET', KEYS[2])
if type(last) == 'string' and #last <= 16 and string.match(last, '^%d+$') then
  -- Above 2^53 a number here is not exact; ours get there in the year 2255.
  if tonumber(last) < 9007199254740991 then
    token = math.max(token, tonumber(last) + 1)
  end
end
local text = string.format('%.0f', token)
-- The fence first: should the server refuse to go on, a token is lost and no
-- more.
if ARGV[3] == '0' then
  redis.call('SET', KEYS[2], text)
else
  redis.call('SET', KEYS[2], text, 'PX', ARGV[3])
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return {1, token}
